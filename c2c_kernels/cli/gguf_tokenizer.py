"""A tokenizer built from a GGUF file's metadata, for the two kinds that the packaged models use.

Same tokens as Transformers' own conversion, faster, with one correction: SmolLM's vocabulary was learned with digits
split off one by one (llama.cpp and the original tokenizer.json do so too), which Transformers leaves out; it shows on
runs of blanks before a digit.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from c2c_kernels.cli.gguf_file import read_metadata

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTROL, _USER_DEFINED = 3, 4
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that the GGUF file at `path` describes; other kinds than the two go through Transformers."""
    metadata = read_metadata(path)
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind == "gpt2" and pre == "smollm" and "tokenizer.ggml.merges" in metadata:
        return _wrapped(_byte_level(metadata), metadata)
    if kind == "llama" and str(metadata.get("general.architecture")) in ("gemma", "gemma2", "gemma3"):
        return _wrapped(_gemma(metadata), metadata)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def _byte_level(metadata: dict[str, Any]) -> Any:
    """Byte-level BPE, digits one by one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _gemma(metadata: dict[str, Any]) -> Any:
    """Gemma's BPE with byte fallback; the file lists no merges, they follow from the order of the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    # The file writes a run of blanks as blanks, the vocabulary means the lower block U+2581.
    tokens = ["▁" * len(t) if " " in t and not t.strip() else t for t in metadata["tokenizer.ggml.tokens"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=_merges(vocab), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to cut a token into two tokens: earlier tokens first, then the longer left part first."""
    return [
        (token[:cut], token[cut:])
        for token in vocab
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in vocab and token[cut:] in vocab
    ]


def _wrapped(tokenizer: Any, metadata: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Adds the file's control and user-defined tokens, the special roles, a start token and the chat template."""
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokens, types = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", [])
    control = [token for token, kind in zip(tokens, types, strict=False) if kind == _CONTROL]
    plain = [token for token, kind in zip(tokens, types, strict=False) if kind == _USER_DEFINED]
    plain = [token for token in plain if tokenizer.token_to_id(token) is not None]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])
    roles = {role: metadata.get(f"tokenizer.ggml.{key}") for role, key in _SPECIAL.items()}
    if metadata.get("tokenizer.ggml.add_bos_token", metadata["tokenizer.ggml.model"] == "llama"):
        bos = tokens[roles["bos_token"]]
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, roles["bos_token"])]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{role: tokens[index] for role, index in roles.items() if index is not None}
    )
    wrapped.chat_template = metadata.get("tokenizer.chat_template")
    return wrapped
