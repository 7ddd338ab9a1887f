/* Gathers, scatters and pools planes of random sizes, on memory of just these sizes; compiled with sanitizers by
 * test_native.py. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

size_t rapa_threads(size_t wanted);
void rapa_gather(const int64_t *geometry, const float *planes, const int64_t *order, size_t rows, const uint8_t *mask,
                 float *patches);
void rapa_pick_rows(const float *rows, size_t n_rows, size_t width, const int64_t *which, size_t count, float *picked);
void rapa_rows_of_patches(const int64_t *order, size_t rows, int64_t *row_of_patch, size_t n_patches);
int rapa_scatter(const int64_t *geometry, const float *input_errors, const int64_t *row_of_patch, const int64_t *offsets,
                 size_t n_tiles, size_t images, const uint8_t *mask, float *planes);
struct stage {
    int64_t images, h, w, channels, pooled_h, pooled_w, average, relu_first;
    double alpha, beta;
};
int rapa_stage_forward(const struct stage *stage, const float *planes, float *smaller, uint8_t *places, float *ratio,
                       float *factor, float *normalised);
int rapa_stage_backward(const struct stage *stage, const float *planes, float *smaller, uint8_t *places, float *scale,
                        float *factor, const float *errors, float *back);

static void *room(size_t bytes)
{
    return malloc(bytes ? bytes : 1);
}

static float *some(size_t floats)
{
    float *memory = room(floats * sizeof(float));
    for (size_t i = 0; i < floats; i++)
        memory[i] = (float)rand() / (float)RAND_MAX - 0.5f;
    return memory;
}

static int64_t between(int64_t first, int64_t last)
{
    return first + rand() % (last - first + 1);
}

static int passage(void)
{
    const int64_t kh = between(1, 5), kw = between(1, 5), down = between(1, 3), across = between(1, 3);
    const int64_t top = between(0, 6), left = between(0, 6), dy = between(1, 3), dx = between(1, 3);
    const int64_t h = between(1, 9), w = between(1, 9), channels = between(1, 40), n_tiles = between(1, 9);
    const int64_t out_h = (h + 2 * top - dy * (kh - 1) - 1) / down + 1, out_w = (w + 2 * left - dx * (kw - 1) - 1) / across + 1;
    if (h + 2 * top < dy * (kh - 1) + 1 || w + 2 * left < dx * (kw - 1) + 1)
        return 0;
    const int64_t geometry[] = {h, w, kh, kw, down, across, top, left, dy, dx, out_h, out_w, channels};
    const size_t images = (size_t)between(1, 4), k = (size_t)(kh * kw * channels), n_p = (size_t)(out_h * out_w);
    const size_t n_patches = images * n_p, rows = rand() % 3 ? n_patches : (size_t)rand() % (n_patches + 1);
    int64_t *order = room(n_patches * sizeof *order), *row_of_patch = room(n_patches * sizeof *row_of_patch);
    for (size_t i = 0; i < n_patches; i++)
        order[i] = (int64_t)i;
    for (size_t i = n_patches; i > 1; i--) {
        const size_t j = (size_t)rand() % i;
        const int64_t other = order[j];
        order[j] = order[i - 1], order[i - 1] = other;
    }
    int64_t *offsets = room(((size_t)n_tiles + 1) * sizeof *offsets);
    for (int64_t i = 0; i <= n_tiles; i++)
        offsets[i] = (int64_t)rows * i / n_tiles;
    uint8_t *mask = rand() % 3 ? NULL : room(n_p * (size_t)(kh * kw));
    for (size_t i = 0; mask && i < n_p * (size_t)(kh * kw); i++)
        mask[i] = (uint8_t)(rand() % 2);
    float *planes = some(images * (size_t)(h * w * channels)), *patches = some(rows * k);
    rapa_gather(geometry, planes, order, rows, mask, patches);
    rapa_rows_of_patches(order, rows, row_of_patch, n_patches);
    const size_t width = (size_t)between(1, 70);
    float *outputs = some(rows * width), *of_pixels = some(n_patches * width);
    rapa_pick_rows(outputs, rows, width, row_of_patch, n_patches, of_pixels);
    rapa_pick_rows(of_pixels, n_patches, width, order, rows, outputs);
    free(outputs), free(of_pixels);
    const int64_t first = n_tiles / 2; /* the rows of some tiles alone */
    float *theirs = some((size_t)(offsets[n_tiles] - offsets[first]) * k);
    int failed = rapa_scatter(geometry, patches, row_of_patch, offsets, (size_t)n_tiles, images, mask, planes);
    failed |= rapa_scatter(geometry, theirs, row_of_patch, offsets + first, (size_t)(n_tiles - first), images, mask, planes);
    free(order), free(row_of_patch), free(offsets), free(mask), free(planes), free(patches), free(theirs);
    return failed ? -1 : 1;
}

static int staging(void)
{
    const int64_t h = between(2, 9), w = between(2, 9), channels = between(1, 70), images = between(1, 4);
    const struct stage stage = {images, h, w, channels, h / 2, w / 2, rand() % 2, rand() % 2, 5e-5, 0.75};
    const size_t size = (size_t)(images * (h / 2) * (w / 2) * channels), all = (size_t)(images * h * w * channels);
    float *planes = some(all), *smaller = some(size), *scale = some(size), *factor = some(size);
    float *normalised = some(size), *errors = some(size), *back = some(all);
    uint8_t *places = stage.average ? NULL : room(size);
    rapa_stage_forward(&stage, planes, smaller, places, scale, factor, normalised);
    const int failed = rapa_stage_backward(&stage, planes, smaller, places, scale, factor, errors, back);
    free(planes), free(smaller), free(scale), free(factor), free(normalised), free(errors), free(back), free(places);
    return failed;
}

int main(void)
{
    for (int done = 0, tries = 0; done < 600; tries++) {
        if (done == 300 && rapa_threads(3) != 3)
            return 2;
        const int one = passage();
        if (one < 0 || staging())
            return 1;
        done += one;
    }
    printf("600 passages\n");
    return 0;
}
