"""Text -> token ids: train a tokenizer or load one, and encode fast.

All kinds become one `tokenizers.Tokenizer`, saved as `tokenizer.json` in Hugging Face layout, so transformers loads
what was trained here. Encoders with the same ids, ten times faster, are in `byte_level`, `wordpiece` and `unigram`.

A special token that is spelled out in a document ("[SEP]", "<|endoftext|>") is ordinary text to all encoders here, as
if transformers were told split_special_tokens=True: what a stranger wrote must not end documents or mask words.
"""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from configs.schema import TokenizerConfig
from data_pipeline.byte_level import byte_level_encoder, tiktoken_ranks
from data_pipeline.encode import EncodeFlat, character_encoder, plain_encoder
from data_pipeline.shards import DataError, token_dtype
from data_pipeline.unigram import unigram_encoder
from data_pipeline.wordpiece import wordpiece_encoder

END_OF_TEXT = "<|endoftext|>"
BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Sentinels of fill in the middle: prefix, middle, suffix. Ours and Qwen's, StarCoder's, Code Llama's
FIM_SPELLINGS = [
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
    ("▁<PRE>", "▁<MID>", "▁<SUF>"),
]
LARGEST_ALPHABET = 1000  # characters that WordPiece keeps; rarer ones become [UNK]
# Scores of a unigram vocabulary are rounded to multiples of 1 / 8192. They then survive JSON to the last bit, which
# those of a SentencePiece file do not, and their sums are exact, so that ties are broken alike before and after saving.
SCORE_GRID = 1 << 13
SENTENCE_ENDS = set(".!?。！？…।؟")


def make_tokenizer(
    config: TokenizerConfig, texts: Iterable[str], directory: Path, loaded: Tokenizer | None = None
) -> Tokenizer:
    """Train on `texts` or load, as `config` says. Raises DataError. `directory` receives spiece.model, for unigram.

    loaded: the pretrained one, if it was loaded already; sentinels are added to it.
    """
    if not config.fim_tokens:
        return loaded or _make(config, texts, directory)
    sentinels = FIM_SPELLINGS[0]
    rest = config.model_copy(update={"vocab_size": max(1, config.vocab_size - len(sentinels))})
    tokenizer = loaded or _make(rest, texts, directory)
    if fim_ids(tokenizer) is None:
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in sentinels])
    return tokenizer


def _make(config: TokenizerConfig, texts: Iterable[str], directory: Path) -> Tokenizer:
    if config.type == "pretrained":
        if config.path is None:
            raise DataError("data.build.tokenizer.path is missing: type pretrained needs the tokenizer's folder")
        return load_tokenizer(Path(config.path))
    sample = _limited(texts, config.sample_bytes)
    if config.type == "byte_bpe":
        return _train_byte_bpe(sample, config.vocab_size)
    if config.type == "wordpiece":
        return _train_wordpiece(sample, config.vocab_size, config.lowercase)
    if config.type == "unigram":
        return _train_unigram(sample, config.vocab_size, directory)
    return _characters(sample)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load tokenizer.json, GPT-2's vocab.json + merges.txt, BERT's vocab.txt or SentencePiece's spiece.model.

    Raises DataError.
    """
    try:
        found = _load(folder)
    except Exception as error:  # `tokenizers` raises no other kind
        raise DataError(f"{folder}: holds a broken tokenizer ({error}); copy or train it again") from error
    if found is None:
        raise DataError(
            f"{folder}: holds no tokenizer (looked for tokenizer.json, vocab.json with merges.txt, vocab.txt, "
            f"spiece.model)"
        )
    return found


def _load(folder: Path) -> Tokenizer | None:
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    if (folder / "merges.txt").is_file() and (folder / "vocab.json").is_file():
        tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
        return _as_byte_level(tokenizer)
    if (folder / "vocab.txt").is_file():
        words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        lowercase = not any("A" <= word[:1] <= "Z" for word in words)
        return _as_bert(
            Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")), lowercase
        )
    if (folder / "spiece.model").is_file():
        return _from_sentencepiece(folder / "spiece.model")
    return None


def save_tokenizer(tokenizer: Tokenizer, directory: Path, max_len: int) -> None:
    """Write tokenizer.json and the tokenizer_config.json that transformers' AutoTokenizer reads."""
    tokenizer.save(str(directory / "tokenizer.json"))
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_len,
        "clean_up_tokenization_spaces": False,
    }
    if is_bert(tokenizer):
        names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
        settings |= dict(zip(names, BERT_SPECIAL, strict=True))
        settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    else:
        settings["eos_token"] = tokenizer.id_to_token(end_of_text_id(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def copy_tokenizer(folder: Path, to: Path) -> None:
    """Copy a tokenizer's files out of a dataset's or another directory; `to` may exist.

    The copies get the modes of new files, by the user's umask, not those of the dataset. What else a dataset's
    directory holds stays there: manifest, shards, reports, and what a cache keeps.
    """
    others = (".tokens", ".html", "manifest.json", "stages.json")
    to.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(others):
            shutil.copyfile(file, to / file.name)


def fingerprint(tokenizer: Tokenizer) -> str:
    return xxhash.xxh3_128_hexdigest(tokenizer.to_str().encode())


def is_bert(tokenizer: Tokenizer) -> bool:
    return all(tokenizer.token_to_id(token) is not None for token in BERT_SPECIAL)


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id that ends a document. Raises DataError where the vocabulary has no such token."""
    for token in (END_OF_TEXT, "</s>", "[SEP]"):
        if (found := tokenizer.token_to_id(token)) is not None:
            return found
    raise DataError(f"the tokenizer has no token that ends a document ({END_OF_TEXT}, </s> or [SEP])")


def fim_ids(tokenizer: Tokenizer) -> tuple[int, int, int] | None:
    """Ids of the sentinels of fill in the middle: prefix, middle, suffix; None where the vocabulary has none."""
    for spelling in FIM_SPELLINGS:
        prefix, middle, suffix = (tokenizer.token_to_id(token) for token in spelling)
        if prefix is not None and middle is not None and suffix is not None:
            return prefix, middle, suffix
    return None


def flat_encoder(tokenizer: Tokenizer) -> EncodeFlat:
    """The fastest exact encoder for `tokenizer`, on one thread: (texts, end) -> tokens, lengths.

    encode_flat(texts, end) gives the ids of all texts one after the other, (tokens,) uint16 or, if there are larger
    ids, uint32, without special tokens but for `end` (an id or None) after each text; and how many each text has, the
    end included, (texts,) int64. What looks like a special token in a text is text: no document can end another one.
    """
    dtype = token_dtype(num_ids(tokenizer))
    layout = orjson.loads(tokenizer.to_str())
    if _has_only_special(layout):
        for make in (byte_level_encoder, wordpiece_encoder, unigram_encoder, character_encoder):
            if (found := make(tokenizer, layout, dtype)) is not None:
                return found
    return plain_encoder(tokenizer, dtype)


def proven_ranks(tokenizer: Tokenizer) -> dict[bytes, int] | None:
    """What `byte_level.ranked_encoder` makes `flat_encoder` of, where that is exact; else None.

    The proof takes most of the time in which `flat_encoder` is made.
    """
    layout = orjson.loads(tokenizer.to_str())
    return tiktoken_ranks(tokenizer, layout) if _has_only_special(layout) else None


def _has_only_special(layout: dict[str, Any]) -> bool:
    """Whether no added token is found in a text, before anything else is; layout: tokenizer.json."""
    return all(token["special"] for token in layout["added_tokens"])


def num_ids(tokenizer: Tokenizer) -> int:
    """The largest id + 1."""
    return max(tokenizer.get_vocab().values()) + 1


def encoder(tokenizer: Tokenizer) -> Callable[[list[str]], list[np.ndarray]]:
    """A function from texts to arrays of ids, (tokens,) uint16 or uint32 each; see `flat_encoder`."""
    encode_flat = flat_encoder(tokenizer)

    def encode(texts: list[str]) -> list[np.ndarray]:
        tokens, lengths = encode_flat(texts, None)
        stops = np.cumsum(lengths).tolist()
        return [tokens[stop - length : stop] for stop, length in zip(stops, lengths.tolist(), strict=True)]

    return encode


def continues_word(tokenizer: Tokenizer) -> np.ndarray:
    """(vocab,) bool: the token goes on the word of the token before it (WordPiece's ##, no leading space otherwise)."""
    tokens = _tokens(tokenizer)
    if is_bert(tokenizer):
        return np.array([token.startswith("##") for token in tokens])
    return np.array([not token.startswith(("Ġ", "▁", "Ċ")) for token in tokens])


def ends_sentence(tokenizer: Tokenizer) -> np.ndarray:
    """(vocab,) bool: the token ends with a sentence's last sign."""
    return np.array([token[-1:] in SENTENCE_ENDS for token in _tokens(tokenizer)])


def ordinary_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Ids that stand for text, int64: all but the special tokens."""
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return np.array([index for index in range(tokenizer.get_vocab_size()) if index not in special])


def _tokens(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.id_to_token(index) or "" for index in range(tokenizer.get_vocab_size())]


def _limited(texts: Iterable[str], num_bytes: int) -> Iterable[str]:
    for text in texts:
        if num_bytes <= 0:
            return
        num_bytes -= len(text.encode("utf-8"))
        yield text


def _train_byte_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _as_byte_level(tokenizer)


def _as_byte_level(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return tokenizer


def _train_wordpiece(texts: Iterable[str], vocab_size: int, lowercase: bool) -> Tokenizer:
    """A vocabulary of pieces with every kept character, alone and as ##continuation.

    The trainer numbers characters in the order of a hash table that is seeded anew in every process, and breaks ties
    between merges by these numbers. So it is given all of them in advance, sorted, as if they were special tokens, and
    only its vocabulary is used.
    """
    texts = list(texts)
    in_training = _as_bert(Tokenizer(models.WordPiece(unk_token="[UNK]")), lowercase)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(in_training.normalizer.normalize_str(text))
    characters = _most_frequent(counts, min(LARGEST_ALPHABET, vocab_size // 4))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*BERT_SPECIAL, *characters, *(f"##{character}" for character in characters)],
        limit_alphabet=len(characters),
        show_progress=False,
    )
    in_training.train_from_iterator(texts, trainer)
    vocabulary = in_training.get_vocab()
    return _as_bert(Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]")), lowercase)


def _most_frequent(counts: Counter[str], limit: int) -> list[str]:
    """The most frequent characters that are no white space, at most `limit`, sorted; equal counts share one fate."""
    ranked = [(character, count) for character, count in counts.most_common() if not character.isspace()]
    if len(ranked) > limit:
        ranked = [(character, count) for character, count in ranked if count > ranked[limit][1]]
    return sorted(character for character, _ in ranked)


def _as_bert(tokenizer: Tokenizer, lowercase: bool) -> Tokenizer:
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return _with_bert_template(tokenizer) if tokenizer.token_to_id("[CLS]") is not None else tokenizer


def _with_bert_template(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in BERT_SPECIAL])
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    return tokenizer


def _train_unigram(texts: Iterable[str], vocab_size: int, directory: Path) -> Tokenizer:
    import sentencepiece

    model = io.BytesIO()  # given a file's name, the trainer writes that into the model
    lines = (line for text in texts for line in text.splitlines() if line.strip())
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",
            character_coverage=1.0,
            num_threads=1,  # with several, rounding depends on who is first, and so does the vocabulary
            pad_id=-1,
            bos_id=-1,
            eos_id=1,
            unk_id=0,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"the training text is too little for a unigram vocabulary ({error}); give more sources, or another "
            f"data.build.tokenizer.type"
        ) from error
    (directory / "spiece.model").write_bytes(model.getvalue())
    return _from_sentencepiece(directory / "spiece.model")


def _from_sentencepiece(path: Path) -> Tokenizer:
    """A Unigram model with the pieces, scores and normalisation of a SentencePiece file, giving the same ids."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(path.read_bytes())
    pieces = [(piece.piece, round(piece.score * SCORE_GRID) / SCORE_GRID) for piece in proto.pieces]
    unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == piece.UNKNOWN)
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=proto.trainer_spec.byte_fallback))
    steps: list[normalizers.Normalizer] = []
    if proto.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    if proto.normalizer_spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    control = [piece.piece for piece in proto.pieces if piece.type in (piece.CONTROL, piece.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def _characters(texts: Iterable[str]) -> Tokenizer:
    alphabet = sorted({character for text in texts for character in text})
    vocabulary = {token: index for index, token in enumerate([END_OF_TEXT, "<|unknown|>", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (END_OF_TEXT, "<|unknown|>")])
    return tokenizer
