# shellcheck shell=bash
# Sourced by scripts/rapa-dist, scripts/test and .ci/run: `set_up run` or `set_up test` makes sure that .venv holds
# what they need, and says on stderr what it does. Where nothing is missing it takes some milliseconds.

root=$(readlink -f -- "${BASH_SOURCE[0]}")
root=${root%/scripts/setup.sh}
venv=$root/.venv

# set_up run|test: returns when .venv is whole, and ends the script where it can't be made so.
set_up() {
    is_whole "$1" && return
    mkdir -p -- "$venv" || die "no virtual environment can be made in $root."
    command -v flock >/dev/null || die "flock is missing: install the package util-linux."
    exec {lock}>>"$venv/set-up.lock"
    if ! flock --nonblock "$lock"; then
        say "waiting for another set-up of this clone to end …"
        flock "$lock"
    fi
    is_whole "$1" || install_all "$1" # unless the other one has done it meanwhile
    exec {lock}>&-
}

# A stamp says that a set-up came to its end, and from which files it was made.
is_whole() {
    [[ -x $venv/bin/python && -e $venv/set-up.$1 && $(<"$venv/set-up.$1") == "$(fingerprint)" ]]
}

# The path belongs to it: a virtual environment can't be moved.
fingerprint() {
    cat -- "$root"/{pyproject.toml,requirements.lock,setup.py,scripts/{setup.sh,build_backend.py}} \
        "$root"/rapa_dist/native/{build.py,*.{c,h,inc}} - <<<"$root" | sha256sum
}

install_all() {
    local extras=plots wanted
    [[ $1 == test ]] && extras=plots,dev
    wanted=$(fingerprint)
    log=$venv/set-up.log
    job=
    trap 'interrupted' INT TERM

    if is_usable; then
        say "bringing .venv up to date:"
    else
        say "setting up .venv (first run only):"
        find "$venv" -mindepth 1 -maxdepth 1 ! -name set-up.lock -exec rm -rf -- {} +
    fi
    rm -f -- "$venv"/set-up.{run,test}
    : >"$log"
    # Stays until all is done: what an interrupted set-up leaves behind is thrown away by the next one.
    printf '%s\n' "$root" >"$venv/set-up.unfinished"
    mkdir -p -- "$venv/set-up.tmp" # here, so that it goes with the rest if pip is stopped
    if [[ ! -x $venv/bin/python ]]; then
        local python
        python=$(find_python) || exit 1
        stage "making a virtual environment" "$python" -I -m venv "$venv"
    fi
    # First and by itself: where only a CPU build is offered, nothing that comes later replaces it.
    stage "installing torch" pip_install "$(grep '^torch==' "$root/requirements.lock")"
    stage "installing setuptools" pip_install setuptools
    stage "installing rapa-dist" pip_install --no-build-isolation --editable "${root}[$extras]"
    [[ -e $root/rapa_dist/native/_library.failed ]] && build_with_zig
    rm -rf -- "$venv/set-up.tmp"
    mv -- "$venv/set-up.unfinished" "$venv/set-up.root"
    printf '%s\n' "$wanted" >"$venv/set-up.run"
    [[ $1 == run ]] || printf '%s\n' "$wanted" >"$venv/set-up.test"
    trap - INT TERM
}

# For a machine without a C compiler, or with one that fails: Zig's from PyPI, kept no longer than this takes.
build_with_zig() {
    local zig=$venv/set-up.tmp/zig
    if ! attempt "installing a C compiler, for now" pip_install --target "$zig" ziglang ||
        ! attempt "building the library" env PYTHONPATH="$zig" "$venv/bin/python" -P "$root/rapa_dist/native/build.py"; then
        say "  tiles will multiply with NumPy, slower; \`rapa-dist doctor\` says what to do."
    fi
}

# Whether what is in .venv can be built upon: nothing half done, not copied from elsewhere, with a pip that runs.
is_usable() {
    [[ ! -e $venv/set-up.unfinished ]] &&
        [[ ! -e $venv/set-up.root || $(<"$venv/set-up.root") == "$root" ]] &&
        [[ -x $venv/bin/python ]] && "$venv/bin/python" -P -m pip --version &>/dev/null
}

# Prints the first Python that fits; keep the versions those of requires-python in pyproject.toml.
find_python() {
    local name version found='' bare=''
    for name in python3.11 python3.12 python3.13 python3; do
        command -v "$name" >/dev/null || continue
        if version=$("$name" -I -c 'import sys; print("%d.%d" % sys.version_info[:2]); import ensurepip, venv' 2>/dev/null); then
            case $version in
            3.11 | 3.12 | 3.13)
                command -v "$name"
                return
                ;;
            esac
        else
            case $version in 3.11 | 3.12 | 3.13) bare=$version ;; esac
        fi
        found+="${found:+, }$name is ${version:-broken}"
    done
    if [[ $bare ]]; then
        die "Python $bare is here, but without ensurepip it can't make a virtual environment." \
            "On Debian and Ubuntu: apt-get install python$bare-venv"
    fi
    die "rapa-dist needs Python 3.11, 3.12 or 3.13; found: ${found:-no python3}." \
        "Install one of them so that it is called python3.11, python3.12, python3.13 or python3."
}

# Only as a stage's command: takes the place of that stage's process, so that stopping one stops the other.
pip_install() {
    TMPDIR=$venv/set-up.tmp exec "$venv/bin/python" -P -m pip install --disable-pip-version-check --no-input \
        --progress-bar off --constraint "$root/requirements.lock" "$@"
}

# stage TEXT COMMAND…: an attempt without which nothing can go on.
stage() {
    attempt "$@" && return
    tail -n 20 -- "$log" >&2
    die "the set-up failed; the lines above are the end of $log." \
        "Mend what they name and call the same command again."
}

# attempt TEXT COMMAND…: runs the command, its output in the log, one line with the time for the user.
attempt() {
    local text="  $1 …" start=$SECONDS
    shift
    printf '%s' "$text" >&2
    "$@" >>"$log" 2>&1 </dev/null &
    job=$!
    if [[ -t 2 ]]; then
        while kill -0 "$job" 2>/dev/null; do
            printf '\r%s %d s' "$text" $((SECONDS - start)) >&2
            sleep 0.3
        done
        printf '\r%s' "$text" >&2
    fi
    if ! wait "$job"; then
        say " failed after $((SECONDS - start)) s"
        return 1
    fi
    say " $((SECONDS - start)) s"
}

interrupted() {
    [[ $job ]] && kill "$job" 2>/dev/null && wait "$job"
    say
    say "Interrupted. The next call sets .venv up from the start."
    exit 130
}

# What the report is looked at with. A test that finds none says so, and fails.
have_browser() {
    local name
    for name in chromium chromium-browser google-chrome; do
        command -v "$name" >/dev/null && return
    done
    [[ $EUID == 0 ]] && command -v apt-get >/dev/null || return 0
    log=$venv/browser.log
    : >"$log"
    trap 'interrupted' INT TERM
    export DEBIAN_FRONTEND=noninteractive
    # in a process of its own: the other tests can be run without
    (stage "installing chromium, to look at reports with" \
        sh -c 'apt-get install -y --no-install-recommends chromium ||
            { apt-get update && apt-get install -y --no-install-recommends chromium; }')
    trap - INT TERM
}

say() { printf '%s\n' "$*" >&2; }

die() {
    say "Error: $1"
    shift
    local line
    for line in "$@"; do say "  $line"; done
    exit 1
}
