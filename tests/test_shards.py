"""Inside of a shard_map: measured as the model that is not split, on four devices in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import fixup_init as fi

mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
keys = jax.random.split(jax.random.key(0), 9)
kernel = lambda k, *shape: jax.random.normal(keys[k], shape) * (2 / shape[-2]) ** 0.5
p = {"stem": kernel(0, 32, 32), "up": kernel(1, 32, 64), "down": kernel(2, 64, 32), "head": kernel(3, 32, 8),
     "stacked": {"a": kernel(5, 3, 32, 32), "b": kernel(6, 3, 32, 32)}}
x = jax.random.normal(keys[4], (64, 32))

def normalized(x, mean):
    x = x - mean(x)
    return x / jnp.sqrt(mean(x**2) + 1e-5)

def network(p, x, flag, mean):
    x = x @ p["stem"]
    x = x + jax.nn.relu(normalized(x @ p["up"], mean)) @ p["down"]
    def body(x, block):
        run = lambda x: x + jax.nn.relu(normalized(x @ block["a"], mean)) @ block["b"]
        return jax.lax.cond(flag, run, lambda x: jnp.tanh(x @ block["a"]), x), None
    x, _ = jax.lax.scan(body, x, p["stacked"])
    return x @ p["head"]

def whole(p, x, flag):
    return network(p, x, flag, lambda v: v.mean(0))

def parted(p, x, flag):
    def local(p, x, flag):
        return network(p, x, flag, lambda v: jax.lax.pmean(v.mean(0), "d"))
    return jax.shard_map(local, mesh=mesh, in_specs=(P(), P("d"), P()), out_specs=P("d"), check_vma={check})(p, x, flag)

def columns(p, x, flag):
    def local(up, down, x):
        return jax.lax.psum(jax.nn.relu(x @ up) @ down, "d")
    split = jax.shard_map(local, mesh=mesh, in_specs=(P(None, "d"), P("d"), P()), out_specs=P(), check_vma={check})
    x = x @ p["stem"]
    return (x + split(p["up"], p["down"], x)) @ p["head"]

def together(p, x, flag):
    x = x @ p["stem"]
    return (x + jax.nn.relu(x @ p["up"]) @ p["down"]) @ p["head"]

def close(a, b):
    assert abs(a - b) <= 2e-4 * abs(a) + 1e-6, (a, b)

for one, other in ((whole, parted), (together, columns)):
    for normalization in ("kept", "removed", "affine"):
        for flag in (True, False):
            first, second = (
                fi.analyze(fi.Function(f, p), p, x, jnp.bool_(flag), normalization=normalization, key=jax.random.key(7))
                for f in (one, other)
            )
            assert not second.unmeasured
            assert [(r.kind, r.name, r.repeat) for r in first] == [(r.kind, r.name, r.repeat) for r in second]
            for a, b in zip(first, second):
                assert (a.forward is None) == (b.forward is None)
                if a.forward is None or (other is columns and a.name == "down"):
                    continue  # the part of a product that one device has
                if a.shape != b.shape:
                    assert "4 devices" in b.note, b
                for s, t in ((a.forward, b.forward), (a.backward, b.backward)):
                    close(s.mean, t.mean), close(s.variance, t.variance), close(s.zeros, t.zeros)
                if a.weight is not None:
                    close(a.weight.gradient_norm, b.weight.gradient_norm)
                    close(a.weight.parameter_norm, b.weight.parameter_norm)
print("done")
"""


@pytest.mark.parametrize("check", [True, False])
def test_what_devices_hold_is_measured_as_the_whole(check: bool) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("{check}", str(check))], capture_output=True, text=True,
        env={**os.environ, "XLA_FLAGS": flags},
    )  # fmt: skip
    assert run.returncode == 0 and run.stdout == "done\n", run.stderr[-3000:]
