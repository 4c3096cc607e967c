"""python -m kvnumba."""

import re

import numpy as np
import oracle
import pytest

import kvnumba
from kvnumba import __main__ as command_line
from kvnumba.commands import quality
from kvnumba.commands.timing import Timing, in_turns
from kvnumba.formats import FORMATS
from kvnumba.models.sampling import softmax

DEMO = ["demo", "--bytes", "60", "--new", "3", "--backend", "numpy"]


@pytest.mark.parametrize("name", ["cuda", "cud"])
def test_info_of_a_choice_that_cannot_run(name, capsys, monkeypatch):
    monkeypatch.setenv("KVNUMBA_BACKEND", name)
    command_line.main(["info"])
    chosen = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("chosen backend"))
    assert "none: " in chosen


def test_info_says_why(capsys):
    command_line.main(["info"])
    out = capsys.readouterr().out
    for pattern in (
        r"^numpy +\d",
        r"^backend cuda +(yes|no: .*(numba-cuda|CUDA))",
        r"^backend numpy +yes",
        r"^threads +\d+ of",
        r"^threading layer +\w",
    ):
        assert re.search(pattern, out, re.MULTILINE), pattern


def test_memory(capsys):
    command_line.main(["memory", "--preset", "llama-3-70b", "--layers", "2", "--batch", "3"])
    out = capsys.readouterr().out
    assert "KV cache: 2 layers, 8 KV heads of 128, batch 3" in out
    assert "int4" in out


def test_memory_of_another_shape(capsys):
    command_line.main(["memory", "--preset", "llama-3-8b", "--kv-heads", "4", "--head-dim", "64"])
    assert "KV cache: 32 layers, 4 KV heads of 64, batch 1" in capsys.readouterr().out


def test_memory_refuses(capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.main(["memory", "--head-dim", "7"])
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err
        == "kvnumba memory: head_dim: expected an even number, int4 packs pairs; got 7\n"
    )


def test_a_missing_extra_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        command_line.main(["demo"])
    assert stop.value.code == "kvnumba demo needs tqdm: pip install 'kvnumba[demo]'"


class TestDemo:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        pytest.importorskip("tqdm", reason="the demo extra is not installed")
        monkeypatch.setattr("kvnumba.commands.texts.NUM_NAMES", 8)

    def test_table_and_text(self, capsys):
        command_line.main(DEMO)
        out = capsys.readouterr().out
        rows = {
            line.split()[0]: line.split()[1:]
            for line in out.splitlines()
            if re.match(r"(float|int)\d+ +\d", line)
        }
        assert list(rows) == ["float32", "float16", "int8", "int4"]
        # 60 bytes of text in 4 layers of 2 heads of 64
        assert [rows[fmt][0] for fmt in rows] == ["245,760", "122,880", "69,120", "34,560"]
        # and the ring of 10 blocks of 16 tokens in float16
        assert [rows[fmt][2] for fmt in rows] == ["0", "0", "0", "327,680"]
        assert rows["float32"][6:] == ["100.00%", "0.0e+00", "100%"]
        assert rows["float16"][8] == rows["int8"][8] == rows["int4"][8] == "100%"
        assert all(f"--- {fmt} writes on ---" in out for fmt in rows)

    def test_plot(self, tmp_path):
        pytest.importorskip("matplotlib", reason="the demo extra is not installed")
        command_line.main([*DEMO, "--plot", str(tmp_path / "table.png")])
        assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--prompt", "/no/such/file"], "No such file or directory"),
            (["--model", "/no/such/folder"], "expected a checkpoint folder with a config.json"),
            (["--bytes", "9000"], "together at most the model's 8192 positions; got 9000 and"),
            (["--bytes", "0"], "--bytes, --new: expected at least 1 and 0"),
            (["--new", "-1"], "--bytes, --new: expected at least 1 and 0"),
        ],
    )
    def test_mistakes_are_one_line(self, capsys, options, message):
        with pytest.raises(SystemExit) as stop:
            command_line.main([*DEMO, *options])
        assert stop.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("kvnumba demo: ")
        assert message in last

    def test_an_empty_prompt(self, tmp_path, capsys):
        (tmp_path / "empty").write_bytes(b"")
        with pytest.raises(SystemExit):
            command_line.main([*DEMO, "--prompt", str(tmp_path / "empty")])
        assert "is empty" in capsys.readouterr().err


class TestQuality:
    QUALITY = ("quality", "--bytes", "80", "--backend", "numpy")

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        pytest.importorskip("tqdm", reason="the demo extra is not installed")
        monkeypatch.setattr("kvnumba.commands.texts.NUM_NAMES", 3)

    @pytest.fixture
    def of_tokens(self, monkeypatch):
        """In the place of the bundled model, one whose tokens are not bytes."""
        decoder = kvnumba.IncrementalDecoder(32, 2, 2, 200, 50, num_kv_heads=1)
        monkeypatch.setattr("kvnumba.IncrementalDecoder.from_pretrained", lambda folder: decoder)
        return decoder

    @staticmethod
    def rows(out):
        """The first table: name -> cells; and the second's lines of numbers."""
        first, second = out.split("squared error")
        lines = [re.split("  +", line) for line in first.splitlines()]
        rows = {name: cells for name, *cells in lines if name.split(" ")[0] in FORMATS and len(cells) > 3}
        layers = re.findall(r"^ +\d+ +(\S+) +(\S+)$", second, re.MULTILINE)
        return rows, np.array(layers, float)

    def test_tables(self, capsys):
        command_line.main(self.QUALITY)
        out = capsys.readouterr().out
        rows, layers = self.rows(out)
        assert list(rows) == [recipe.name for recipe in quality.RECIPES]
        assert "4,000 tokens of 4,000 bytes of tempfile.py" in out
        assert [row[0] for row in rows.values()] == [
            *("32.00", "16.00", "8.00", "9.00", "8.50", "8.50"),
            *("5.00", "4.50", "4.50", "4.50", "4.50", "5.00"),
        ]
        assert [row[1] for row in rows.values()] == [*["0"] * 4, *["128"] * 2, *["0"] * 3, *["128"] * 3]
        assert rows["float32"][3:] == ["+0.00%", "0.0e+00", "100%"]
        divergences = {name: float(row[4]) for name, row in rows.items()}
        assert divergences["int4 rotated, calibrated"] < divergences["int4"] / 2
        assert divergences["float16"] < divergences["int8"] < divergences["int4"]
        assert layers.shape == (4, 2)
        assert (layers[:, 1] < layers[:, 0]).all()

    def test_without_a_calibration(self, capsys, of_tokens, tmp_path):
        (tmp_path / "ids.txt").write_text(" ".join(map(str, range(50))) + "\n" + "7 " * 40)
        np.save(tmp_path / "ids.npy", np.arange(100) % 50)
        command_line.main([*self.QUALITY, "--text", str(tmp_path / "ids.txt")])
        out = capsys.readouterr().out
        rows, _ = self.rows(out)
        assert "rows with a calibration are left out: --calibrate-on FILE measures one" in out
        assert "reads 80 tokens of" in out
        assert list(rows) == [recipe.name for recipe in quality.RECIPES if not recipe.calibrated]
        assert float(rows["float32"][2]) > 20  # perplexity, of random weights
        assert len(rows["float32"]) == 5  # no look-ups

        options = ["--text", str(tmp_path / "ids.txt"), "--calibrate-on", str(tmp_path / "ids.npy")]
        command_line.main([*self.QUALITY, *options])
        out = capsys.readouterr().out
        assert list(self.rows(out)[0]) == [recipe.name for recipe in quality.RECIPES]
        assert "100 tokens of ids.npy" in out

        of_tokens.calibrate(np.arange(100) % 50, source="a file").save(tmp_path / "c.npz")
        options[2:] = ["--calibration", str(tmp_path / "c.npz")]
        command_line.main([*self.QUALITY, *options])
        assert "100 tokens of a file" in capsys.readouterr().out

    def test_what_is_measured(self):
        """Against the formulas, on logits and attention of the whole text at once."""
        decoder = kvnumba.IncrementalDecoder(32, 2, 2, 200, 50, num_kv_heads=1)
        tokens = np.random.default_rng(0).integers(0, 50, 30)
        recipes = [quality.RECIPES[0], quality.Recipe("int4")]

        def make_caches(recipes, length):
            return [decoder.make_cache(length, backend="numpy", **recipe.options) for recipe in recipes]

        p, q = (
            softmax(decoder.extend(cache, [cache.add_sequence()], [tokens]))
            for cache in make_caches(recipes, 30)
        )
        exact, int4 = quality.measure(decoder, recipes, tokens, False, make_caches)
        assert exact.surprise == pytest.approx(-np.log(p[np.arange(29), tokens[1:]]).mean(), rel=1e-4)
        assert int4.surprise == pytest.approx(-np.log(q[np.arange(29), tokens[1:]]).mean(), rel=1e-4)
        assert int4.divergence == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-2)
        assert (exact.divergence, int4.lookups) == (0, None)

        errors, (cache,) = [], make_caches(recipes[1:], 30)
        seq_id = cache.add_sequence()

        def attention(layer, q, k, v):
            cache.update(seq_id, k.swapaxes(0, 1), v.swapaxes(0, 1), layer=layer)
            want = oracle.attention(q, k.swapaxes(0, 1), v.swapaxes(0, 1))[0]
            found = oracle.attention(q, *cache.get_kv(seq_id, layer=layer))[0]
            errors.append(((found - want) ** 2).mean() / (want**2).mean())
            return want.astype(np.float32)

        decoder.forward(tokens, np.arange(30), attention)
        found = quality.layer_errors(decoder, tokens, make_caches(recipes, 30))
        np.testing.assert_allclose(found[0], errors, rtol=1e-2)

    def test_plot(self, tmp_path):
        pytest.importorskip("matplotlib", reason="the demo extra is not installed")
        command_line.main([*self.QUALITY, "--plot", str(tmp_path / "table.png")])
        assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--text", "/no/such/file"], "No such file or directory"),
            (["--bytes", "1"], "--bytes: expected 2 to 8192, the model's positions; got 1"),
            (["--bytes", "8193"], "--bytes: expected 2 to 8192, the model's positions; got 8193"),
            (["--calibration", __file__], "not a file that a calibration was saved to"),
            (["--calibration", "a", "--calibrate-on", "b"], "not allowed with argument --calibration"),
        ],
    )
    def test_mistakes_are_one_line(self, capsys, options, message):
        with pytest.raises(SystemExit) as stop:
            command_line.main([*self.QUALITY, *options])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "--text: expected a file of token ids (.npy, or integers with white space between them)"),
            ("1 2 three", "--text: expected token ids in"),
            ("1", "--text: expected a file of at least 2 tokens; "),
            ("1 50", "token_ids: expected 0 to 49; got 50"),
        ],
    )
    def test_mistakes_in_token_ids(self, capsys, of_tokens, tmp_path, content, message):
        options = []
        if content is not None:
            (tmp_path / "ids").write_text(content)
            options = ["--text", str(tmp_path / "ids")]
        with pytest.raises(SystemExit) as stop:
            command_line.main([*self.QUALITY, *options])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


class TestBench:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        monkeypatch.setattr("kvnumba.commands.bench.CONTEXTS", (128, 256))
        monkeypatch.setattr("kvnumba.commands.bench.torch_peers", dict)

    def test_a_row_for_each_format(self, capsys):
        command_line.main(["bench", "--backend", "numpy"])
        lines = capsys.readouterr().out.splitlines()
        assert [name for line in lines for name in line.split()[:1] if name in FORMATS] == list(FORMATS)

    @pytest.mark.parametrize(("slowest", "busy"), [(10e-3, True), (1.4e-3, False)])
    def test_repeats_that_differ(self, capsys, monkeypatch, slowest, busy):
        timing = Timing(median=1.2e-3, fastest=1e-3, slowest=slowest)
        monkeypatch.setattr("kvnumba.commands.bench.repeated", lambda call: timing)
        command_line.main(["bench", "--backend", "numpy"])
        out = capsys.readouterr().out
        assert ("busy machine" in out) == busy
        assert (", took 1.2 ms (between 1 and 10)" in out) == busy
        assert out.count(")*") == (12 if busy else 0)

    def test_plot(self, capsys, monkeypatch, tmp_path):
        pytest.importorskip("matplotlib", reason="the bench extra is not installed")
        command_line.main(["bench", "--backend", "numpy", "--plot", str(tmp_path / "table.png")])
        assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_calls_take_turns():
    order = []
    found = in_turns({name: lambda name=name: order.append(name) for name in "ab"}, 3, before=order.append)
    assert order == list("aabb" * 4)
    assert list(found) == ["a", "b"]
    assert all(0 < t.fastest <= t.median <= t.slowest for t in found.values())


def test_a_disturbed_timing():
    assert Timing(1.0, 0.8, 1.3).disturbed
    assert not Timing(1.0, 0.9, 1.3).disturbed
