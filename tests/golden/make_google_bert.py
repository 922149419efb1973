"""Writes tests/golden/google_bert/ with real TensorFlow: a tiny BERT as Google's code saves it, and what it computes.

    python -m venv /tmp/tf && /tmp/tf/bin/pip install tensorflow-cpu
    /tmp/tf/bin/python tests/golden/make_google_bert.py

Variables have the names of Devlin et al. 2019's code, with what its optimizer keeps for one of them; the forward pass
is written out here in TensorFlow. The weights are random. Made with TensorFlow 2.21.0.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import tensorflow as tf

FOLDER = Path(__file__).parent / "google_bert"
LAYERS, HIDDEN, HEADS, INTERMEDIATE, POSITIONS = 2, 16, 2, 24, 12
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklm.", *(f"##{c}" for c in "abcdefghijklm")]


def make_variables() -> dict[str, tf.Variable]:
    sizes = {f"bert/embeddings/{name}_embeddings": (rows, HIDDEN) for name, rows in
             (("word", len(VOCABULARY)), ("token_type", 2), ("position", POSITIONS))}  # fmt: skip
    for norm in ("bert/embeddings", "cls/predictions/transform"):
        sizes |= {f"{norm}/LayerNorm/{leaf}": (HIDDEN,) for leaf in ("gamma", "beta")}
    dense = {"bert/pooler/dense": (HIDDEN, HIDDEN), "cls/predictions/transform/dense": (HIDDEN, HIDDEN)}
    for layer in (f"bert/encoder/layer_{number}" for number in range(LAYERS)):
        dense |= {f"{layer}/attention/self/{part}": (HIDDEN, HIDDEN) for part in ("query", "key", "value")}
        dense |= {f"{layer}/attention/output/dense": (HIDDEN, HIDDEN)}
        dense |= {
            f"{layer}/intermediate/dense": (HIDDEN, INTERMEDIATE),
            f"{layer}/output/dense": (INTERMEDIATE, HIDDEN),
        }
        for norm in (f"{layer}/attention/output", f"{layer}/output"):
            sizes |= {f"{norm}/LayerNorm/{leaf}": (HIDDEN,) for leaf in ("gamma", "beta")}
    for name, size in dense.items():
        sizes |= {f"{name}/kernel": size, f"{name}/bias": size[1:]}
    sizes |= {"cls/predictions/output_bias": (len(VOCABULARY),), "cls/seq_relationship/output_bias": (2,)}
    sizes |= {"cls/seq_relationship/output_weights": (2, HIDDEN)}
    rng = np.random.default_rng(0)
    return {
        name: tf.Variable((rng.normal(0, 0.3, size) + name.endswith("gamma")).astype(np.float32))
        for name, size in sizes.items()
    }


def logits(weights: dict[str, tf.Variable], ids: np.ndarray, types: np.ndarray) -> tuple[tf.Tensor, tf.Tensor]:
    def norm(x: tf.Tensor, name: str) -> tf.Tensor:
        mean, variance = tf.nn.moments(x, -1, keepdims=True)
        scaled = (x - mean) * tf.math.rsqrt(variance + 1e-12)
        return scaled * weights[f"{name}/LayerNorm/gamma"] + weights[f"{name}/LayerNorm/beta"]

    def dense(x: tf.Tensor, name: str) -> tf.Tensor:
        return tf.matmul(x, weights[f"{name}/kernel"]) + weights[f"{name}/bias"]

    def gelu(x: tf.Tensor) -> tf.Tensor:  # the tanh formula, as Google's code has it
        return 0.5 * x * (1.0 + tf.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    words = weights["bert/embeddings/word_embeddings"]
    x = tf.gather(words, ids) + tf.gather(weights["bert/embeddings/token_type_embeddings"], types)
    x = norm(x + weights["bert/embeddings/position_embeddings"][: ids.shape[1]], "bert/embeddings")
    for layer in (f"bert/encoder/layer_{number}" for number in range(LAYERS)):
        query, key, value = (
            tf.transpose(
                tf.reshape(dense(x, f"{layer}/attention/self/{part}"), (*ids.shape, HEADS, HIDDEN // HEADS)),
                (0, 2, 1, 3),
            )
            for part in ("query", "key", "value")
        )
        shares = tf.nn.softmax(tf.matmul(query, key, transpose_b=True) / math.sqrt(HIDDEN // HEADS))
        mixed = tf.reshape(tf.transpose(tf.matmul(shares, value), (0, 2, 1, 3)), x.shape)
        x = norm(x + dense(mixed, f"{layer}/attention/output/dense"), f"{layer}/attention/output")
        inner = gelu(dense(x, f"{layer}/intermediate/dense"))
        x = norm(x + dense(inner, f"{layer}/output/dense"), f"{layer}/output")
    pooled = tf.tanh(dense(x[:, 0], "bert/pooler/dense"))
    hidden = norm(gelu(dense(x, "cls/predictions/transform/dense")), "cls/predictions/transform")
    masked = tf.matmul(hidden, words, transpose_b=True) + weights["cls/predictions/output_bias"]
    pair = tf.matmul(pooled, weights["cls/seq_relationship/output_weights"], transpose_b=True)
    return masked, pair + weights["cls/seq_relationship/output_bias"]


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    weights = make_variables()
    rng = np.random.default_rng(1)
    ids = rng.integers(0, len(VOCABULARY), (2, POSITIONS))
    types = np.repeat([[0] * 5 + [1] * (POSITIONS - 5)], 2, 0)
    masked, pair = logits(weights, ids, types)
    name = "bert/pooler/dense/bias"
    extra = {f"{name}/adam_m": tf.Variable(tf.ones(HIDDEN)), "global_step": tf.Variable(7, dtype=tf.int64)}
    values = {key: variable.numpy() for key, variable in (weights | extra).items()}
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        saved = {key: tf.compat.v1.Variable(value, use_resource=False) for key, value in values.items()}
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver(saved).save(session, str(FOLDER / "bert_model.ckpt"), write_meta_graph=False)
    (FOLDER / "checkpoint").unlink()
    settings = {
        "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": HIDDEN,
        "initializer_range": 0.02, "intermediate_size": INTERMEDIATE, "max_position_embeddings": POSITIONS,
        "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "type_vocab_size": 2, "vocab_size": len(VOCABULARY),
    }  # fmt: skip
    (FOLDER / "bert_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (FOLDER / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCABULARY))
    computed = {"input_ids": ids.tolist(), "token_type_ids": types.tolist()}
    computed |= {"masked": masked.numpy().round(6).tolist(), "pair": pair.numpy().round(6).tolist()}
    (FOLDER / "logits.json").write_text(json.dumps(computed) + "\n")


if __name__ == "__main__":
    main()
