"""One BLAS thread wherever a tile lives: more would change the bits and fight over the cores."""

from threadpoolctl import ThreadpoolController, threadpool_limits


def one_blas_thread() -> threadpool_limits:
    """Limit NumPy's BLAS to one thread; call `restore_original_limits()` on the result to undo it.

    PyTorch's own thread pool is left alone: the coordinator's digital side may use every core.
    """
    return ThreadpoolController().select(user_api="blas").limit(limits=1)
