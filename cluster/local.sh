#!/usr/bin/env bash
# A Ray cluster of several nodes on one machine, for trying out and for tests; `local.sh --help` says how.
# As root each node is a network namespace with an address and a /dev/shm of its own, joined by a bridge: what crosses
# from one node to another crosses a network, which can be cut. Else, or with --plain, the nodes are raylets on one host.
set -uo pipefail
# shellcheck source-path=SCRIPTDIR source=../scripts/setup.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../scripts/setup.sh"

readonly OBJECT_STORE_BYTES=100000000 # rows never pass through it; Ray wants at least 75 MB
readonly START_S=120 HEAD_PORT=6379 METRICS_PORT=8080 DASHBOARD_PORT=8265

usage() {
    cat <<'END'
A Ray cluster of several nodes on this machine.

  local.sh start [--nodes 3] [--tiles-per-node 21] [--plain] [--dashboard] [--metrics]
  local.sh run [--node 0] -- COMMAND…   run COMMAND on a node, with RAY_ADDRESS and the token in its environment
  local.sh status                       the nodes, whether they live, how many processes they have
  local.sh env                          what a shell on this machine needs to reach it: eval "$(local.sh env)"
  local.sh cut N SECONDS                take the link of node N down, and up again after SECONDS
  local.sh kill N                       kill node N: its raylet and every other process on it, at once
  local.sh revive N                     start a killed node again, empty
  local.sh stop                         kill everything and remove every trace

start   --nodes           how many nodes; node 0 is the head
        --tiles-per-node  how many analog_tile each of them offers
        --plain           raylets on one host, though this user may make namespaces; there, cut can't be had
        --dashboard       Ray's dashboard, on the head (needs `pip install 'ray[default]'`); also for `ray job submit`
        --metrics         each node offers its metrics to Prometheus (needs `pip install 'ray[default]'`)

Before the command, --state DIR names the folder that the cluster lives in, so that there can be several; without it,
$RAPA_DIST_LOCAL_CLUSTER, else a folder of this user's below $TMPDIR or /tmp. Needs bash, util-linux and, for
namespaces, iproute2 and root. Exit codes: 0 ok, 1 failed, 2 wrong usage; of run, those of COMMAND.
END
}

misused() {
    say "Error: $1"
    say "  \`$0 --help\` shows what can be given."
    exit 2
}

# --- what is kept of a cluster, in $state: kind, id, nodes, tiles, options, address, token, and a folder for each node

default_state() {
    local folder=${TMPDIR:-/tmp}
    # The names of Ray's sockets below it have 107 bytes in all, of which Ray takes 65.
    ((${#folder} > 16)) && folder=/tmp
    printf '%s/rapa-dist-local-%s' "$folder" "$EUID"
}

keep() { printf '%s\n' "$2" >"$state/$1"; }

load() {
    [[ -e $state/kind ]] || die "no cluster of this script is in $state." "Start one with: $self start"
    [[ -O $state ]] || die "$state belongs to somebody else." "Name another folder with --state."
    kind=$(<"$state/kind") id=$(<"$state/id") nodes=$(<"$state/nodes") tiles=$(<"$state/tiles")
    options=$(<"$state/options") subnet=$(<"$state/subnet")
    address=
    if [[ -e $state/address ]]; then address=$(<"$state/address"); fi
}

number() { # NAME VALUE LEAST MOST
    if ! [[ $2 =~ ^[0-9]{1,6}$ ]] || ((10#$2 < $3 || 10#$2 > $4)); then
        misused "$1 is a number from $3 to $4; it was '$2'."
    fi
}

is_node() { number "a node of this cluster" "$1" 0 $((nodes - 1)); }

# --- nodes

namespace() { printf 'rapa-%s-%s' "$id" "$1"; }
link() { printf 'rapa%s-%s' "$id" "$1"; } # 15 characters are the most that Linux takes
bridge() { printf 'rapa%s' "$id"; }
node_address() { if [[ $kind == namespaces ]]; then printf '%s.%d' "$subnet" $(($1 + 1)); else printf '127.0.0.1'; fi; }

holder() { # the process that all of a node's processes descend from
    if [[ -e $state/n$1/holder ]]; then printf '%s' "$(<"$state/n$1/holder")"; fi
}

# Whether it is that process still, and no other that got its number.
is_held() {
    local pid
    pid=$(holder "$1")
    [[ $pid && -e /proc/$pid/environ ]] &&
        grep -qzxF "RAPA_DIST_LOCAL_NODE=$id-$1" "/proc/$pid/environ" 2>/dev/null
}

# Prints the ids of every process on a node.
processes() {
    if [[ $kind == namespaces ]]; then
        ip netns pids "$(namespace "$1")" 2>/dev/null
    elif is_held "$1"; then
        ps -e -o pid=,ppid=,stat= | awk -v top="$(holder "$1")" '
            $3 !~ /^[ZX]/ { parent[$1] = $2 }
            END {
                for (pid in parent) {
                    for (up = pid; up in parent && up != top; up = parent[up]);
                    if (up == top) print pid
                }
            }'
    fi
}

has_raylet() {
    local pid name
    for pid in $(processes "$1"); do
        read -r name 2>/dev/null <"/proc/$pid/comm" && [[ $name == raylet ]] && return
    done
    return 1
}

# Prints what a process on a node has in its environment, NAME=VALUE, one a line.
environment() {
    local shm=/dev/shm
    [[ -e $state/shm ]] && shm=$(<"$state/shm")/n$1
    printf '%s\n' RAY_AUTH_MODE=token "RAY_AUTH_TOKEN_PATH=$state/token" "RAY_TMPDIR=$state/n$1" "TMPDIR=$state/n$1" \
        "RAPA_DIST_SHM=$shm" RAY_USAGE_STATS_ENABLED=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 "PATH=$venv/bin:$PATH"
    if [[ $address ]]; then printf '%s\n' "RAY_ADDRESS=$address"; fi
}

has_module() { "$venv/bin/python" -P -c 'import importlib.util as u, sys; sys.exit(not u.find_spec(sys.argv[1]))' "$1"; }

# Prints a free port of this machine for each argument.
free_ports() {
    "$venv/bin/python" -P - "$@" <<'END'
import socket, sys

held = [socket.create_server(("", 0)) for _ in sys.argv[1:]]
sys.stdout.write("\n".join(str(server.getsockname()[1]) for server in held) + "\n")
END
}

# The command that becomes a node's holder: adopts what loses its parent (prctl 36 is PR_SET_CHILD_SUBREAPER), so that
# no process of the node is ever lost; runs `ray start`, says how it ended, and stays.
readonly HOLD='import ctypes, os, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
os.execvp(sys.argv[1], sys.argv[1:])'
# shellcheck disable=SC2016  # for the shell that is started
readonly HOLDER='here=$1 shm=$2; shift 2
if [[ $shm ]]; then mount -t tmpfs -o mode=1777 tmpfs /dev/shm; fi || echo 1 >"$here/started"
[[ -e $here/started ]] || { "$@"; echo $? >"$here/started"; }
trap "" HUP INT
while :; do sleep 3600 & wait $!; done'

# Starts a node's holder, and with it its raylet; does not wait for it.
launch() {
    local node=$1 here=$state/n$1 at_once=$((tiles / 4 + 1)) cores own_shm='' mark
    local -a into=() command ports names
    cores=$(nproc)
    ((at_once < cores)) && at_once=$cores # processes that Ray starts at a time; by its default one per core
    mkdir -p -- "$here" || return
    rm -f -- "$here/started" "$here/holder"
    if [[ $kind == namespaces ]]; then
        into=(ip netns exec "$(namespace "$node")") own_shm=1
    elif [[ -e $state/shm ]]; then
        mkdir -p -- "$(<"$state/shm")/n$node" || return
    fi
    command=("$venv/bin/ray" start "--node-ip-address=$(node_address "$node")" "--temp-dir=$here"
        "--num-cpus=$at_once" --num-gpus=0 "--resources={\"analog_tile\": $tiles}"
        "--object-store-memory=$OBJECT_STORE_BYTES" --disable-usage-stats)
    if ((node == 0)); then
        command+=(--head "--port=${address##*:}")
        if [[ $options == *dashboard* ]]; then
            command+=(--include-dashboard=true "--dashboard-host=$(node_address 0)" "--dashboard-port=$(<"$state/dashboard")")
        else
            command+=(--include-dashboard=false)
        fi
    else
        command+=("--address=$address")
    fi
    if [[ $options == *metrics* ]]; then command+=("--metrics-export-port=$(metrics_port "$node")"); fi
    if [[ $kind == plain ]]; then # where all nodes share one host's ports
        names=(node-manager-port object-manager-port dashboard-agent-listen-port dashboard-agent-grpc-port
            runtime-env-agent-port)
        # Ray Client is there where its package is; without it, Ray refuses the option
        if ((node == 0)) && has_module grpc; then names+=(ray-client-server-port); fi
        mapfile -t ports < <(free_ports "${names[@]}")
        ((${#ports[@]} == ${#names[@]})) || return
        for mark in "${!names[@]}"; do command+=("--${names[mark]}=${ports[mark]}"); done
    fi
    local -a variables
    mapfile -t variables < <(environment "$node")
    env -u RAY_ADDRESS "${variables[@]}" "RAPA_DIST_LOCAL_NODE=$id-$node" \
        "RAY_worker_maximum_startup_concurrency=$at_once" setsid "${into[@]}" \
        "$venv/bin/python" -P -c "$HOLD" bash -c "$HOLDER" holder "$here" "$own_shm" \
        env -u RAY_ADDRESS "${command[@]}" </dev/null &>"$here/start.log" &
    printf '%s\n' "$!" >"$here/holder"
}

metrics_port() { if [[ $kind == plain ]]; then printf '%d' $(($(<"$state/metrics") + $1)); else printf '%d' $METRICS_PORT; fi; }

# Waits until a node's `ray start` has ended; fails as it did.
await() {
    local here=$state/n$1 deadline=$((SECONDS + START_S))
    until [[ -s $here/started ]]; do
        if ((SECONDS > deadline)) || ! kill -0 "$(holder "$1")" 2>/dev/null; then break; fi
        sleep 0.1
    done
    if [[ ! -s $here/started || $(<"$here/started") != 0 ]]; then
        tail -n 20 -- "$here/start.log" >&2
        return 1
    fi
}

# Kills all that is on a node, as often as something is still there: a process may be forking.
kill_node() {
    local -a found
    local try pid top
    top=$(holder "$1")
    # A plain node's processes are found below their holder: it goes last, and starts nothing meanwhile.
    is_held "$1" && kill -STOP "$top"
    for ((try = 0; try < 200; try++)); do
        mapfile -t found < <(processes "$1")
        ((${#found[@]})) || return 0
        for pid in "${found[@]}"; do
            if [[ $pid != "$top" || ${#found[@]} == 1 ]]; then kill -KILL "$pid" 2>/dev/null; fi
        done
        sleep 0.05
    done
    say "processes of node $1 don't end: ${found[*]}"
    return 1
}

# --- the network between them

may_make_namespaces() {
    [[ $EUID == 0 ]] && command -v ip >/dev/null || return
    local trial=rapa-trial-$$
    # a link, too: a container may allow namespaces and refuse links
    ip netns add "$trial" 2>/dev/null || return
    ip link add "rt$$" type veth peer name eth0 netns "$trial" 2>/dev/null &&
        ip netns exec "$trial" sh -c 'mount -t tmpfs tmpfs /dev/shm' 2>/dev/null
    local answer=$?
    ip netns del "$trial"
    return "$answer"
}

# Prints the first three numbers of a network that this machine has no route to, of those reserved for trials (RFC 2544).
free_subnet() {
    local try candidate
    for ((try = 0; try < 50; try++)); do
        candidate=198.$((18 + RANDOM % 2)).$((RANDOM % 256))
        if ! ip -4 route show | grep -qF "$candidate."; then
            printf '%s' "$candidate"
            return
        fi
    done
    return 1
}

make_network() {
    ip link add "$(bridge)" type bridge forward_delay 0 stp_state 0 &&
        ip address add "$subnet.254/24" dev "$(bridge)" && # so that this machine reaches the dashboard
        ip link set "$(bridge)" up || return
    local node
    for ((node = 0; node < nodes; node++)); do make_link "$node" || return; done
}

make_link() {
    local name
    name=$(namespace "$1")
    ip netns add "$name" &&
        ip link add "$(link "$1")" type veth peer name eth0 netns "$name" &&
        ip link set "$(link "$1")" master "$(bridge)" up &&
        ip -n "$name" link set lo up &&
        ip -n "$name" address add "$(node_address "$1")/24" dev eth0 &&
        ip -n "$name" link set eth0 up &&
        # Leads nowhere: nothing forwards. Ray finds a node's address by asking which it would use to go out.
        ip -n "$name" route add default via "$subnet.254"
}

remove_network() {
    local node
    for ((node = 0; node < nodes; node++)); do
        ip link del "$(link "$node")" 2>/dev/null # with its namespace it would go, too, but only some time later
        ip netns del "$(namespace "$node")" 2>/dev/null
    done
    ip link del "$(bridge)" 2>/dev/null
    return 0
}

# --- commands

start() {
    nodes=3 tiles=21 options='' kind=''
    while (($#)); do
        case $1 in
        --nodes | --tiles-per-node)
            (($# > 1)) || misused "$1 needs a number."
            if [[ $1 == --nodes ]]; then
                number "$1" "$2" 1 200
                nodes=$2
            else
                number "$1" "$2" 1 10000
                tiles=$2
            fi
            shift
            ;;
        --plain) kind=plain ;;
        --dashboard | --metrics) options+=" ${1#--}" ;;
        *) misused "start doesn't know '$1'." ;;
        esac
        shift
    done
    [[ -x $venv/bin/ray ]] || set_up run
    if [[ $options ]] && ! { has_module aiohttp_cors && has_module opencensus; }; then
        die "--dashboard and --metrics need more of Ray than .venv has." \
            "Install it: $venv/bin/pip install --constraint requirements.lock 'ray[default]'"
    fi
    if [[ -z $kind ]]; then
        if may_make_namespaces; then kind=namespaces; else
            kind=plain
            say "No network namespaces can be made here (they need root and iproute2): plain raylets on one host."
        fi
    fi
    if ! mkdir -m 0700 -- "$state" 2>/dev/null; then
        [[ -e $state/kind ]] && die "a cluster is in $state already." "Stop it with: $self stop"
        die "the folder $state can't be made, or is there already." "Remove it, or name another with --state."
    fi
    state=$(cd -- "$state" && pwd -P)
    ((${#state} <= 36)) || {
        rmdir -- "$state"
        die "the path $state has ${#state} characters: more than 36, and Ray's sockets below it can't be made." \
            "Name another folder with --state."
    }
    id=$(od -An -N2 -tx1 /dev/urandom | tr -d ' ')
    subnet='' address=''
    if [[ $kind == namespaces ]]; then subnet=$(free_subnet); fi
    trap 'say "Interrupted."; stop_all; exit 130' INT TERM
    local part
    for part in id nodes tiles options subnet kind; do keep "$part" "${!part}"; done
    if ! bring_up; then
        say "Error: the cluster did not come up; the lines above say why."
        stop_all
        exit 1
    fi
    trap - INT TERM
    local how="namespaces, $subnet.1 to $subnet.$nodes"
    [[ $kind == plain ]] && how="raylets on one host"
    say "$nodes nodes ($how), $tiles analog_tile on each"
    say "address    $address"
    say "train      $self run -- rapa-dist train --address $address --tiles 16,4,1"
    [[ $options == *dashboard* ]] && say "dashboard  http://$(node_address 0):$(<"$state/dashboard"), which asks for the token in $state/token"
    if [[ $options == *metrics* ]]; then
        for ((part = 0; part < nodes; part++)); do say "metrics    http://$(node_address "$part"):$(metrics_port "$part")/metrics"; done
    fi
    say "look       $self run -- rapa-dist stats"
    say "stop       $self stop"
}

bring_up() {
    local node failed=0
    (umask 077 && od -An -v -N32 -tx1 /dev/urandom | tr -d ' \n' >"$state/token") || return
    local -a ports=("$HEAD_PORT" "$DASHBOARD_PORT")
    if [[ $kind == namespaces ]]; then
        make_network || return
    else
        mapfile -t ports < <(free_ports head dashboard)
        [[ -w /dev/shm ]] && keep shm "$(mktemp -d /dev/shm/rapa-dist-local-XXXXXX)" # mode 0700
        keep metrics $((20000 + RANDOM % 10000))
    fi
    address=$(node_address 0):${ports[0]}
    keep dashboard "${ports[1]}"
    launch 0 && await 0 || return
    [[ $kind == plain ]] && address=$(head_address)
    keep address "$address"
    for ((node = 1; node < nodes; node++)); do launch "$node" || return; done
    for ((node = 1; node < nodes; node++)); do await "$node" || failed=1; done
    return "$failed"
}

# Ray takes an address of this machine's own in the place of 127.0.0.1, and writes it here.
head_address() { cat -- "$state/n0/ray_current_cluster"; }

stop_all() {
    local node failed=0
    for ((node = nodes - 1; node >= 0; node--)); do kill_node "$node" || failed=1; done
    ((failed)) && return 1 # what is still there can be found by another stop
    [[ $kind == namespaces ]] && remove_network
    [[ -e $state/shm ]] && rm -rf -- "$(<"$state/shm")"
    rm -rf -- "$state"
}

status() {
    local node alive=0 count word where
    printf '%s nodes (%s), %s analog_tile on each, address %s\n' "$nodes" "$kind" "$tiles" "$address"
    for ((node = 0; node < nodes; node++)); do
        word=dead
        if has_raylet "$node"; then
            word=alive
            alive=$((alive + 1))
        fi
        where=${address%:*}
        if [[ $kind == namespaces ]]; then where=$(node_address "$node"); fi
        count=$(processes "$node" | wc -l)
        printf 'node %s  %s  %s  %s processes\n' "$node" "$where" "$word" "$count"
    done
    ((alive == nodes))
}

# Replaces this script by a command on a node.
run() {
    local node=0
    if [[ ${1-} == --node ]]; then
        (($# > 1)) || misused "--node needs a number."
        is_node "$2"
        node=$2
        shift 2
    fi
    [[ ${1-} == -- ]] && shift
    (($#)) || misused "run needs a command."
    is_held "$node" || die "node $node is dead." "Start it again with: $self revive $node"
    local -a variables
    mapfile -t variables < <(environment "$node")
    if [[ $kind == plain ]]; then exec env "${variables[@]}" "$@"; fi
    # the folder by its name: its handle leads to the file systems outside
    # shellcheck disable=SC2016  # for the shell that is started
    exec nsenter --target "$(holder "$node")" --net --mount -- bash -c 'cd -- "$1" && shift && exec "$@"' \
        run "$PWD" env "${variables[@]}" "$@"
}

cut() {
    (($# == 2)) || misused "cut needs a node and a number of seconds."
    is_node "$1"
    [[ $2 =~ ^[0-9]{1,6}(\.[0-9]+)?$ ]] || misused "cut needs a number of seconds; it was '$2'."
    [[ $kind == namespaces ]] || die "there is no link to cut: the nodes are plain raylets on one host." \
        "Start the cluster as root, where namespaces can be made."
    local sleeping='' # a signal may come before it sleeps
    # its far end: the node keeps its routes, as at a switch that lost power
    trap 'ip link set "$(link "$node")" up' EXIT
    trap '[[ -z $sleeping ]] || kill "$sleeping" 2>/dev/null; exit 130' INT TERM
    node=$1
    ip link set "$(link "$1")" down || exit 1
    sleep "$2" &
    sleeping=$!
    wait "$sleeping"
}

revive() {
    is_node "$1"
    [[ -z $(processes "$1") ]] || die "node $1 is not dead." "Kill it first: $self kill $1"
    (($1 > 0)) || die "the head can't be revived: Ray keeps the cluster in it." "Use: $self stop, then $self start"
    [[ -e $state/shm ]] && rm -rf -- "$(<"$state/shm")/n$1"
    rm -rf -- "$state/n$1"
    if ! launch "$1" || ! await "$1"; then die "node $1 did not start; the lines above say why."; fi
}

print_env() {
    local line
    while read -r line; do
        case $line in RAY_*) printf 'export %s=%q\n' "${line%%=*}" "${line#*=}" ;; esac
    done < <(environment 0)
    if [[ $options == *dashboard* ]]; then
        printf 'export RAY_API_SERVER_ADDRESS=%q\n' "http://$(node_address 0):$(<"$state/dashboard")"
    fi
}

state=${RAPA_DIST_LOCAL_CLUSTER:-$(default_state)}
if [[ ${1-} == --state ]]; then
    (($# > 1)) || misused "--state needs a folder."
    state=$2
    shift 2
fi
case $state in /*) ;; *) state=$PWD/$state ;; esac
state=${state%/}
self=$0
[[ $state == "$(default_state)" ]] || self+=" --state $state"
verb=${1-}
(($#)) && shift
case $verb in
start) start "$@" ;;
run | cut | status | stop | env | kill | revive)
    load
    case $verb in
    run | cut) "$verb" "$@" ;;
    status) status ;;
    env) print_env ;;
    stop) stop_all ;;
    kill | revive)
        (($# == 1)) || misused "$verb needs a node."
        is_node "$1"
        if [[ $verb == kill ]]; then kill_node "$1"; else revive "$1"; fi
        ;;
    esac
    ;;
-h | --help | help) usage ;;
*) misused "$0 takes start, run, status, env, cut, kill, revive or stop; it was '$verb'." ;;
esac
