"""The text of each token id, in the middle of a sentence."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


def decode_table(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> dict[str, str]:
    """Return {id: text} as in the middle of a sentence: some tokenizers drop a token's space when it comes first."""
    lead = [int(i) for i in tokenizer("a", add_special_tokens=False)["input_ids"][-1:]]
    before = _decode(tokenizer, lead)
    table = {}
    for i in ids:
        both = _decode(tokenizer, [*lead, i])
        table[str(i)] = (
            both.removeprefix(before) if both.startswith(before) else _decode(tokenizer, [i])
        )
    return table


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
