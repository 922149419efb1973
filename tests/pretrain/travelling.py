"""Small models with random weights, as runs and as others' directories, for tests of formats."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertConfig, BertForPreTraining, GPT2Config, GPT2LMHeadModel

from configs.load import dump
from configs.schema import CheckpointConfig, PretrainConfig, TokenizerConfig
from data_pipeline.tokenizer import make_tokenizer, save_tokenizer
from pretrain.checkpoint import Fragment
from pretrain.formats.weights import Weights, empty_model
from pretrain.models import build_model
from pretrain.saver import open_saver
from pretrain.state import TrainState
from tests.pretrain.test_saver import Alone

SEQ_LEN = 24
TEXTS = ["the sun and the moon. The river sings slowly, and a king runs under the stone bridge!"] * 5
TOKENIZERS = {"gpt": TokenizerConfig(vocab_size=300), "bert": TokenizerConfig(type="wordpiece", vocab_size=150)}


def shake(model: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter a value of its own: norms and biases begin with ones and zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make_tokenizer_directory(architecture: str, folder: Path) -> int:
    """Train a tokenizer, save it in `folder`; returns how many tokens it has."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(TOKENIZERS[architecture], TEXTS, folder)
    save_tokenizer(tokenizer, folder, SEQ_LEN)
    return tokenizer.get_vocab_size()


def make_run(folder: Path, architecture: str, **model: object) -> torch.nn.Module:
    """A run directory whose checkpoint, of step 1, has random weights; returns the model with them."""
    vocab_size = make_tokenizer_directory(architecture, folder / "tokenizer")
    sizes = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "max_seq_len": SEQ_LEN, **model}
    config = PretrainConfig(
        run_dir=str(folder), model={"architecture": architecture, **sizes}, train={"seq_len": SEQ_LEN, "num_steps": 1}
    )
    trained = shake(build_model(config.model, vocab_size, SEQ_LEN))
    (folder / "config.yaml").write_text(dump(config))
    (folder / "metrics.jsonl").write_text("")
    fragments = [
        Fragment(name, tuple(p.shape), 0, {"master": p.detach().flatten()}) for name, p in trained.named_parameters()
    ]
    with open_saver(folder, CheckpointConfig(), Alone()) as saver:
        saver.save(TrainState(1), fragments, {"dataset": "none"})
    return trained


def gpt2(folder: Path, **settings: object) -> GPT2LMHeadModel:
    """A directory as transformers writes one, with a tokenizer of ours."""
    vocab_size = make_tokenizer_directory("gpt", folder)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": SEQ_LEN, "vocab_size": vocab_size}
    model = shake(GPT2LMHeadModel(GPT2Config(**(sizes | settings))))
    model.save_pretrained(folder)
    return model


def bert(folder: Path, auto: type = BertForPreTraining, **settings: object) -> torch.nn.Module:
    vocab_size = make_tokenizer_directory("bert", folder)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    sizes |= {"max_position_embeddings": SEQ_LEN, "vocab_size": vocab_size}
    model = shake(auto(BertConfig(**(sizes | settings))))
    model.save_pretrained(folder)
    return model


def random_weights(shape: object) -> Weights:
    parameters = dict(shake(empty_model(shape)).named_parameters())
    return Weights(shape, lambda name: parameters[name].detach())


def ids(vocab_size: int, *size: int) -> torch.Tensor:
    return torch.randint(vocab_size, size or (2, SEQ_LEN), generator=torch.Generator().manual_seed(3))
