"""Ray: is there a cluster to join, and can one be started."""

import shlex
import time
from typing import Any

from rapa_dist.check import Check
from rapa_dist.doctor.host import TILES
from rapa_dist.errors import RapaError

_ACTOR_TIMEOUT_S = 60.0


def check_cluster() -> Check:
    """Look which cluster a run would join, without joining it."""
    from rapa_dist.fabric.address import cluster_here, find_address

    name = "Ray cluster"
    try:
        cluster = find_address(None)
    except RapaError as error:
        return Check(name, "failed", "RAY_ADDRESS names one that a run can't join", str(error))
    if cluster is None:
        here = cluster_here()
        if here is None or here[1] is None:
            return Check(name, "ok", "none runs here; a run starts one of its own", quantities={"address": None})
        value = f"{here[1]} A run starts one of its own"
        return Check(name, "ok", value, quantities={"address": None, "not_used": here[0]})
    address, source = cluster
    value = f"{address} takes connections ({source}); a run joins it"
    return Check(name, "ok", value, quantities={"address": address, "source": source})


def check_token() -> Check:
    """Look whether others on this machine can read the user's token for Ray clusters."""
    from rapa_dist.fabric.access import users_token_file

    name = "Ray token"
    file = users_token_file()
    try:
        mode = file.stat().st_mode
    except OSError:
        return Check(name, "ok", "none; a cluster that is started for a run has one of its own")
    if mode & 0o077:
        value = f"others can read {file}, and with it run code as you on clusters that take it"
        return Check(name, "warning", value, f"chmod 600 {shlex.quote(str(file))}")
    return Check(name, "ok", f"in {file}, which only you can read")


def check_actor() -> Check:
    """Join that cluster, or start one, and have an actor answer."""
    from rapa_dist.fabric.cluster import connect
    from rapa_dist.fabric.placement import RESOURCE
    from rapa_dist.fabric.running_code import installed_code

    name = "Ray actor"
    start = time.monotonic()
    try:
        cluster = connect(None, sum(TILES))
    except RapaError as error:
        return Check(name, "failed", "no cluster with room for the tiles", str(error))
    import ray

    try:
        cluster_s = time.monotonic() - start
        probe: Any = ray.remote(_Probe)
        actor = probe.options(num_cpus=0, resources={RESOURCE: 1}).remote()
        installed_code().check(ray.get(actor.code.remote(), timeout=_ACTOR_TIMEOUT_S))
        actor_s = time.monotonic() - start - cluster_s
    except ray.exceptions.RayError as error:
        return Check(name, "failed", f"an actor doesn't start: {error}", "Read its log in /tmp/ray.")
    except RapaError as error:
        return Check(name, "failed", "an actor runs other code than this process", str(error))
    finally:
        cluster.close()
    found = {"cluster": cluster.description, "cluster_s": cluster_s, "actor_s": actor_s}
    value = f"a cluster {cluster.description} ({cluster_s:.1f} s), an actor answered ({actor_s:.1f} s)"
    return Check(name, "ok", value, quantities=found)


class _Probe:
    def code(self) -> Any:
        from rapa_dist.fabric.running_code import installed_code

        return installed_code()
