"""Notes on what happened to the data on the way to tokens, for the log."""

import numpy as np

from activedpo_jax.data.encoding import Encoding
from activedpo_jax.data.tally import Tally


def notes(tally: Tally, encoding: Encoding, num_pairs: int = 0, copies: str = "") -> list[str]:
    """A line for everything that is worth a word: nothing is dropped in silence.

    Args:
      copies: see `copies_note`.
    """
    template = encoding.template
    prompts, responses = f"of {tally.records} prompts", f"of {tally.responses} responses"
    found = [
        f"{count} of {tally.records} records have {name}, which the chat template leaves out (first: {first})"
        for name, (count, first) in tally.left_out.items()
    ]
    if tally.begun:
        found.append(f"{tally.begun} {prompts} begin with {template.begin!r} themselves: it is not added again")
    if tally.ended:
        ends = " or ".join(template.ends)
        found.append(f"{tally.ended} {responses} end in {ends} themselves: it is not added again")
    if tally.across:
        found.append(
            f"{tally.across} {responses} were tokenised apart from their prompts, since a token would have lain across "
            "the border"
        )
    if tally.long_prompts:
        found.append(
            f"{tally.long_prompts} {prompts} ({tally.long_prompts / tally.records:.1%}) are longer than "
            f"{encoding.max_prompt} tokens (up to {tally.longest_prompt}) and lost their beginning: see "
            "config.data.buckets"
        )
    if tally.long_responses:
        found.append(
            f"{tally.long_responses} {responses} ({tally.long_responses / tally.responses:.1%}) are longer than "
            f"{encoding.max_response} tokens (up to {tally.longest_response}) and lost their end, EOS included: see "
            "config.data.buckets"
        )
    if copies:
        found.append(copies)
    pairs = f"of {num_pairs} pairs"
    if tally.same:
        found.append(f"{tally.same} {pairs} have two responses of the same tokens: nothing can be learnt there")
    if tally.ties:
        found.append(f"{tally.ties} {pairs} have equal rewards and no preference: a coin decides, by their id")
    return found


def copies_note(contents: np.ndarray, sides: np.ndarray) -> str:
    """Counts pairs of texts that occur again, in either order, and those of them with another label.

    Args:
      contents, sides: [N] uint64 and [N] int8, as of `preferences.copy_hash`.
    """
    _, first, place = np.unique(contents, return_index=True, return_inverse=True)
    again = len(contents) - len(first)
    if not again:
        return ""
    before = sides[first][place]
    opposite = int(np.sum((sides >= 0) & (before >= 0) & (sides != before)))
    return (
        f"{again} of {len(contents)} pairs are there a second time, {opposite} with the opposite label: each costs a "
        "label"
    )
