"""TensorFlow's checkpoints, written by real TensorFlow (tests/golden/make_google_bert.py) and by us."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForPreTraining

from pretrain import export, import_model
from pretrain.formats import google_bert, hugging_face, sstable, tensor_bundle
from pretrain.formats.crc32c import TABLE, crc32c, masked
from pretrain.formats.weights import FormatError
from tests.conftest import ROOT
from tests.fuzz import broken_bytes
from tests.pretrain.travelling import make_run

GOLDEN = ROOT / "tests/golden/google_bert"
PREFIX = GOLDEN / "bert_model.ckpt"


@pytest.fixture
def golden(tmp_path) -> Path:
    """A copy of the golden checkpoint that a test may damage; returns its prefix."""
    shutil.copytree(GOLDEN, tmp_path / "google")
    return tmp_path / "google/bert_model.ckpt"


def written(prefix: Path) -> dict[str, torch.Tensor]:
    return {name: tensor_bundle.read_tensor(entry) for name, entry in tensor_bundle.open_bundle(prefix).items()}


def test_checksum_is_crc32c():
    assert crc32c(b"123456789") == 0xE3069283 and crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, appendix B.4
    rng = np.random.default_rng(0)
    for size in (0, 1, 63, 64, 65, 127, 128, 129, 1000, 4097, 70_001):
        data, state = rng.bytes(size), 0xFFFFFFFF
        for byte in data:
            state = int(TABLE[(state ^ byte) & 0xFF]) ^ (state >> 8)
        assert crc32c(data) == state ^ 0xFFFFFFFF


def test_bert_of_tensorflow_has_the_logits_that_tensorflow_computed():
    model = google_bert.read(PREFIX, gelu="tanh")
    computed = json.loads((GOLDEN / "logits.json").read_text())
    with torch.no_grad():
        masked_words, pair = model.model()(
            torch.tensor(computed["input_ids"]), token_type_ids=torch.tensor(computed["token_type_ids"])
        )
    assert torch.allclose(masked_words, torch.tensor(computed["masked"]), atol=1e-5)
    assert torch.allclose(pair, torch.tensor(computed["pair"]), atol=1e-5)
    assert not model.notes  # Adam's moments and the step are not worth a word


def test_bert_of_tensorflow_is_imported_with_its_vocabulary(tmp_path):
    for source in (GOLDEN, PREFIX, PREFIX.with_name("bert_model.ckpt.index")):
        assert import_model.run([str(source), str(tmp_path / "imported"), "gelu=tanh"]) == 0
        assert json.loads((tmp_path / "imported/config.json").read_text())["hidden_act"] == "gelu_new"
    computed = json.loads((GOLDEN / "logits.json").read_text())
    inputs = {name: torch.tensor(computed[name]) for name in ("input_ids", "token_type_ids")}
    found = AutoModelForPreTraining.from_pretrained(tmp_path / "imported").eval()(**inputs)
    assert torch.allclose(found.prediction_logits, torch.tensor(computed["masked"]), atol=1e-5)
    tokens = json.loads((tmp_path / "imported/tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(tokens, key=tokens.get) == (GOLDEN / "vocab.txt").read_text().splitlines()


def test_export_to_tensorflow_comes_back_as_it_was(tmp_path):
    trained = make_run(tmp_path / "run", "bert", gelu="tanh")
    assert export.run([str(tmp_path / "run"), "format=tensorflow"]) == 0
    exported = tmp_path / "run/export-tensorflow"
    assert {file.name for file in exported.iterdir()} == {
        "bert_config.json", "vocab.txt", "README.md", "parity.json", "bert_model.ckpt.index",
        "bert_model.ckpt.data-00000-of-00001",
    }  # fmt: skip
    assert json.loads((exported / "parity.json").read_text())["max_abs_logit_difference"] == 0
    assert import_model.run([str(exported), str(tmp_path / "imported"), "gelu=tanh"]) == 0
    back = hugging_face.read(tmp_path / "imported")
    assert all(torch.equal(back.weight(name), parameter) for name, parameter in trained.named_parameters())


def test_what_we_write_has_tensorflows_names_and_numbers(tmp_path):
    model = google_bert.read(PREFIX)
    google_bert.write(model, tmp_path, (GOLDEN / "vocab.txt").read_text().splitlines())
    ours, theirs = written(tmp_path / "bert_model.ckpt"), written(PREFIX)
    assert theirs.keys() - ours.keys() == {"global_step", "bert/pooler/dense/bias/adam_m"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for file in ("bert_config.json", "vocab.txt"):
        read = json.loads if file.endswith("json") else str
        assert read((tmp_path / file).read_text()) == read((GOLDEN / file).read_text())


def test_tensorflow_reads_what_we_write(tmp_path):
    tensorflow = pytest.importorskip("tensorflow", reason="tensorflow is not installed")
    tensors = {"a/kernel": torch.randn(300, 70), "a/bias": torch.randn(3).bfloat16(), "n": torch.tensor(7)}
    tensors |= {f"layer_{number}/some/long/name/of/a/tensor": torch.randn(5) for number in range(1000)}  # many blocks
    tensor_bundle.write(tmp_path / "model.ckpt", tensors.items())
    reader = tensorflow.train.load_checkpoint(str(tmp_path / "model.ckpt"))
    assert reader.get_variable_to_shape_map() == {name: list(tensor.shape) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        assert np.array_equal(reader.get_tensor(name).astype(np.float32), tensor.float().numpy())


def test_tensors_of_all_kinds_come_back(tmp_path):
    tensors = {f"x/{dtype}": torch.arange(6).view(2, 3).to(dtype) for dtype in tensor_bundle.NUMBERS}
    tensors |= {"empty": torch.empty(0, 4), "number": torch.tensor(3.5)}
    tensors |= {f"many/{number:05d}" * 9: torch.tensor([number]) for number in range(1500)}
    tensor_bundle.write(tmp_path / "m", tensors.items())
    back = written(tmp_path / "m")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_damage_is_named_with_file_and_cure(golden):
    data = golden.with_name("bert_model.ckpt.data-00000-of-00001")
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    with pytest.raises(FormatError, match=r"data-00000-of-00001: bert/embeddings/LayerNorm/gamma is damaged .* copy"):
        google_bert.read(golden).model()
    content[100] ^= 1
    data.write_bytes(content[:5000])
    with pytest.raises(FormatError, match=r"has 5000 bytes, .* ends at \d+; it was cut, copy"):
        google_bert.read(golden).model()
    data.unlink()
    with pytest.raises(FormatError, match=r"data-00000-of-00001: cannot be read .* the index names it, get both"):
        google_bert.read(golden).model()
    index = Path(f"{golden}.index")
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"bert_model.ckpt.index: does not end as an index .* copy it again"):
        google_bert.read(golden)


def test_a_checkpoint_of_another_shape_or_without_heads_is_refused(golden):
    config = golden.with_name("bert_config.json")
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"hidden_size": 8}))
    with pytest.raises(FormatError, match=r"has the shape \(32, 16\), the configuration beside it says \(32, 8\)"):
        google_bert.read(golden).model()
    config.write_text(json.dumps(settings | {"num_hidden_layers": 3}))
    with pytest.raises(FormatError, match=r"index: lacks bert/encoder/layer_2/attention/output/LayerNorm/beta and 15"):
        google_bert.read(golden)
    config.write_text(json.dumps({key: value for key, value in settings.items() if key != "vocab_size"}))
    with pytest.raises(FormatError, match=r"bert_config.json: lacks 'vocab_size'"):
        google_bert.read(golden)


def test_compressed_blocks_are_refused_by_name(tmp_path):
    sstable.write(tmp_path / "x.index", {b"a": b"b"})
    content = bytearray((tmp_path / "x.index").read_bytes())
    place = content.index(b"ab") + 2 + 8  # behind the entry and the restarts: the kind of compression, its checksum
    content[place] = 1
    content[place + 1 : place + 5] = masked(bytes(content[: place + 1])).to_bytes(4, "little")
    (tmp_path / "x.index").write_bytes(content)
    with pytest.raises(FormatError, match=r"its blocks are compressed \(kind 1\), expected none"):
        sstable.read(tmp_path / "x.index")


def test_no_damage_of_any_byte_is_used_or_raises_anything_else(golden):
    """Broken files: the checkpoint reads as it was, or a FormatError names it."""
    expected, refused = written(golden), 0
    for file in (Path(f"{golden}.index"), golden.with_name("bert_model.ckpt.data-00000-of-00001")):
        sound = file.read_bytes()
        for content in broken_bytes(sound, 60):
            file.write_bytes(content)
            try:
                found = written(golden)
                assert found.keys() == expected.keys()
                assert all(torch.equal(found[name], expected[name]) for name in expected)
            except FormatError as error:
                refused += str(golden.parent) in str(error)
        file.write_bytes(sound)
    assert refused > 95  # the rest hit the unused bytes of the footer, or came behind the last tensor


def test_valid_checksums_around_nonsense_raise_nothing_else(tmp_path):
    """What somebody may have written on purpose: entries of random bytes under right checksums."""
    rng = random.Random(1)
    for _ in range(200):
        entries = {b"": rng.randbytes(rng.randrange(12)), b"x": rng.randbytes(rng.randrange(30))}
        sstable.write(tmp_path / "x.index", entries)
        (tmp_path / "x.data-00000-of-00001").write_bytes(bytes(100))
        try:
            written(tmp_path / "x")
        except FormatError as error:
            assert "x." in str(error)
