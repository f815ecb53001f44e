"""The command line, as real processes on models in real files."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

NETS = """
import flax.linen as nn

class Net(nn.Module):
    depth: int = 2

    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.Conv(8, (3, 3))(x)
        for _ in range(self.depth):
            y = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3))(x)))
            x = x + nn.Conv(8, (3, 3))(y)
        return nn.Dense(10)(x.mean((1, 2)))

model = Net()
number = 3

def deep(depth=5):
    return Net(depth)

def needs(depth):
    return Net(depth)

def called():
    import jax, fixup_init as fi
    apply = lambda w, x: jax.custom_derivatives.linear_call(lambda w, x: x @ w, lambda w, y: y @ w.T, w, x)
    return fi.Function(apply, jax.ShapeDtypeStruct((8, 3), "float32"))

def open_sum():
    import jax, fixup_init as fi
    def apply(w, x):
        x = x @ w["stem"]
        return (x.mean(-1, keepdims=True) + x.max(-1, keepdims=True) + x @ w["branch"]) @ w["head"]
    shapes = {k: jax.ShapeDtypeStruct((8, 8), "float32") for k in ("stem", "branch", "head")}
    return fi.Function(apply, shapes)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("nets")
    (folder / "nets.py").write_text(NETS)
    return folder


def run(folder: pathlib.Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fixup_init", *args], cwd=folder, capture_output=True, text=True, timeout=300
    )


def test_inspect(folder: pathlib.Path) -> None:
    shown = run(folder, "inspect", "nets.py:model", "--input", "4,16,16,3", "--scheme", "fixup")
    assert shown.returncode == 0, shown.stderr
    assert "L = 2" in shown.stdout and "head: zero" in shown.stdout
    data = run(folder, "inspect", "nets:deep", "--input", "4,16,16,3", "--arg", "train=False", "--json")
    found = json.loads(data.stdout)
    assert found["num_branches"] == 5 and found["norms"][0]["form"] == "inference"


def test_inspect_says_how_to_settle_a_sum(folder: pathlib.Path, capsys: pytest.CaptureFixture[str],
                                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from fixup_init.cli import main

    monkeypatch.chdir(folder)
    assert main(["inspect", "nets.py:open_sum", "--input", "4,8"]) == 0
    text = capsys.readouterr().out
    assert "undecided sum 1" in text and "term 2  branch" in text and '{"sum 1": 0}' in text
    assert main(["inspect", "nets.py:open_sum", "--input", "4,8", "--scheme", "fixup"]) == 2
    assert "'sum 1'" in capsys.readouterr().err


def test_inspect_writes_a_page(folder: pathlib.Path) -> None:
    done = run(
        folder, "inspect", "nets.py:model", "--input", "4,16,16,3", "--scheme", "fixup", "--html", "pages/net.html"
    )
    assert done.returncode == 0, done.stderr
    assert "L = 2" in done.stdout and "wrote pages/net.html" in done.stderr
    page = (folder / "pages/net.html").read_text()
    assert "<svg" in page and "head: zero" in page and "Conv_{1,3}" in page
    assert sorted(p.name for p in (folder / "pages").iterdir()) == ["net.html"]


def test_compare(folder: pathlib.Path) -> None:
    done = run(
        folder,
        "compare",
        "nets.py:model",
        "--input",
        "4,8,8,3",
        "--json",
        "--html",
        "out/page.html",
        "--figure",
        "f.png",
    )
    assert done.returncode == 0, done.stderr
    labels = [one["label"] for one in json.loads(done.stdout)["propagations"]]
    assert labels == ["model, kept", "model, removed", "fixup, removed"]
    assert "<html" in (folder / "out/page.html").read_text()
    assert (folder / "f.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (folder / "out").iterdir()) == ["page.html"]


def test_analyze_beside_theory(folder: pathlib.Path) -> None:
    arguments = ("nets.py:model", "--input", "4,8,8,3", "--scheme", "fixup", "--normalization", "removed")
    done = run(folder, "analyze", *arguments, "--predict", "--all", "--csv", "rows/net.csv")
    assert done.returncode == 0, done.stderr
    assert "fixup, removed" in done.stdout and "predicted" in done.stdout and "Conv_4/kernel" in done.stdout
    lines = (folder / "rows/net.csv").read_text().splitlines()
    assert lines[0].startswith("label,") and len(lines) > 10
    one = run(folder, "predict", *arguments, "--json")
    (found,) = json.loads(one.stdout)["propagations"]
    assert found["kind"] == "predicted" and found["rows"][0]["forward"]["variance"] == pytest.approx(1)


def test_check_fails_with_its_status(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fixup_init.cli import main

    monkeypatch.chdir(folder)
    arguments = ["check", "nets.py:deep", "--input", "4,8,8,3", "--normalization", "removed", "--max-growth", "10"]
    assert main([*arguments, "--scheme", "fixup"]) == 0
    assert capsys.readouterr().out.startswith("Stable. The signal is flat")
    assert main([*arguments, "--scheme", "he_normal", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["stable"] and "Conv_" in found["text"]


@pytest.mark.parametrize(
    "args, says",
    [
        (["nets.py:nope", "--input", "4,8,8,3"], "has no attribute 'nope'; it has"),
        (["none.py:model", "--input", "4,8,8,3"], "There is no file none.py"),
        (["nowhere.at.all:model", "--input", "4,8,8,3"], "No module 'nowhere'"),
        (["nets.py", "--input", "4,8,8,3"], "expected package.module:attribute"),
        (["nets.py:model", "--input", "4,x"], "expected sizes and maybe a dtype"),
        (["nets.py:model", "--input", "4,0,8,3"], "sizes are at least 1"),
        (["nets.py:model", "--input", "4,8,8,3:float33"], "expected sizes and maybe a dtype"),
        (["nets.py:model", "--input", "4,8,8,3", "--arg", "train"], "expected name=value"),
        (["nets.py:needs", "--input", "4,8,8,3"], "without required arguments"),
        (["nets.py:called", "--input", "4,8"], "The primitive `linear_call`"),
        (["nets.py:number", "--input", "4,8,8,3"], "expected a Flax Linen module"),
        (["nets.py:model", "--input", "4,8"], "could not be initialized"),
        (["nets.py:model", "--input", "4,8,8,3", "--scheme", "fixap"], "did you mean 'fixup'"),
    ],
)
def test_errors(folder: pathlib.Path, args: list[str], says: str, capsys: pytest.CaptureFixture[str],
                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from fixup_init.cli import main

    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    assert main(["inspect", *args]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_demo(tmp_path: pathlib.Path) -> None:
    done = run(tmp_path, "demo", "--depth", "20", "--epochs", "2", "--out", "report")
    assert done.returncode == 0, done.stderr
    for text in ("L = 9", "Drift with depth", "Fixup: The signal is flat", "test accuracy"):
        assert text in done.stdout
    result = json.loads((tmp_path / "report/result.json").read_text())
    assert [n["network"] for n in result["networks"]] == ["batch norm", "no normalization, He", "Fixup"]
    assert (tmp_path / "report/report.html").stat().st_size > 1e6
    assert (tmp_path / "report/drift.png").stat().st_size < 200_000
