"""Bad input: every error names the value, what was expected, and the next step."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from zoo import IMAGES, VECTORS

import fixup_init as fi
from fixup_init.models.resnet import cifar_resnet


class TwoHeads(nn.Module):
    """One output that two layers feed alike."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.relu(nn.Dense(8, name="trunk")(x))
        return nn.Dense(3, name="left")(h) + nn.Dense(3, name="right")(h)


def test_a_model_that_returns_no_array() -> None:
    class Nothing(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            nn.Dense(3)(x)
            return {"loss": None}

    with pytest.raises(fi.ModelError, match=r"Nothing returned .*None.* no array.*return an array"):
        fi.structure(Nothing(), VECTORS)


def test_no_array_given() -> None:
    with pytest.raises(fi.ModelError, match=r"no array to trace with.*ShapeDtypeStruct"):
        fi.structure(nn.Dense(3), 4)


def test_an_input_of_the_wrong_shape() -> None:
    with pytest.raises(fi.ModelError, match=r"(?s)float32\[8,16\].*Give the arguments"):
        fi.structure(cifar_resnet(20, norm="batch"), VECTORS)
    module = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    with pytest.raises(fi.ModelError, match=r"Linear could not be traced on inputs \(float32\[8,16\]\)"):
        fi.structure(module, VECTORS)


def test_variables_of_another_shape() -> None:
    model = cifar_resnet(20, norm="batch")
    variables = fi.init(model, jax.random.key(0), IMAGES)
    gray = jax.ShapeDtypeStruct((2, 32, 32, 1), jnp.float32)
    with pytest.raises(fi.ModelError, match=r"conv1/kernel.*\(3, 3, 3, 16\).*expects \(3, 3, 1, 16\)"):
        fi.analyze(model, variables, gray)
    with pytest.raises(fi.ModelError, match=r"`.*`, missing from the variables"):
        fi.analyze(model, {"params": {}}, IMAGES)


def test_a_misspelled_scheme() -> None:
    with pytest.raises(ValueError, match=r"scheme='fixupp' is not known; did you mean 'fixup'"):
        fi.plan(cifar_resnet(20), IMAGES, scheme="fixupp")
    with pytest.raises(TypeError, match="neither a name nor a scheme object"):
        fi.plan(cifar_resnet(20), IMAGES, scheme=3)  # type: ignore[arg-type]


def test_an_ambiguous_head() -> None:
    with pytest.raises(fi.StructureError, match=r"ambiguous.*`left/kernel`, `right/kernel`.*fi.Fixup\(head="):
        fi.plan(TwoHeads(), VECTORS)
    assert fi.structure(TwoHeads(), VECTORS).undecided[0].what == "head"
    named = fi.plan(TwoHeads(), VECTORS, scheme=fi.Fixup(head="left/kernel"))
    assert named["left/kernel"].value == 0.0 and named["right/kernel"].std
    assert fi.plan(TwoHeads(), VECTORS, scheme=fi.Fixup(head=None))["left/kernel"].std
    with pytest.raises(fi.StructureError, match="'middle' is no parameter"):
        fi.plan(TwoHeads(), VECTORS, scheme=fi.Fixup(head="middle"))


def test_data_that_is_not_finite() -> None:
    model = cifar_resnet(20, norm="fixup")
    x = jnp.zeros((2, 8, 8, 3)).at[1, 2, 3, 0].set(jnp.nan)
    with pytest.raises(fi.DataError, match=r"input/0.*1 values that are not finite.*\(1, 2, 3, 0\).*np.isfinite"):
        fi.analyze(model, fi.init(model, jax.random.key(0), x), x)


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"expected a Flax Linen module.*Make an instance"):
        fi.structure(nn.Dense, VECTORS)
    with pytest.raises(TypeError, match="type int"):
        fi.structure(3, VECTORS)


def test_what_is_no_key() -> None:
    with pytest.raises(TypeError, match=r"jax\.random\.key"):
        fi.init(nn.Dense(3), "seed", VECTORS)


def test_other_options() -> None:
    with pytest.raises(ValueError, match="normalization='off': expected one of 'kept', 'removed'"):
        fi.structure(nn.Dense(3), VECTORS, normalization="off")
    model = nn.Dense(3)
    with pytest.raises(ValueError, match="probe='input'"):
        fi.analyze(model, model.init(jax.random.key(0), jnp.ones((2, 3))), jnp.ones((2, 3)), probe="input")  # type: ignore[arg-type]


def test_a_shared_kernel_with_two_claims() -> None:
    def apply(p: Any, x: Any) -> Any:
        x = x + jax.nn.relu(x @ p["a"]) @ p["b"]
        return (x + jax.nn.relu(x @ p["b"]) @ p["a"]) @ p["head"]

    shapes = {"a": (16, 16), "b": (16, 16), "head": (16, 2)}
    model = fi.Function(apply, {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()})
    with pytest.raises(fi.StructureError, match=r"is shared.*tied=\"first\""):
        fi.plan(model, VECTORS)
    assert fi.plan(model, VECTORS, scheme=fi.Fixup(tied="first"))["b"].value == 0.0


def test_the_optimizer_checks_its_tree() -> None:
    import optax

    plan = fi.plan(nn.Dense(3), VECTORS)
    with pytest.raises(ValueError, match=r"not those of the plan.*variables\['params'\]"):
        fi.optimizer(optax.sgd(0.1), plan).init({"params": {"kernel": jnp.ones((16, 3)), "bias": jnp.ones(3)}})
