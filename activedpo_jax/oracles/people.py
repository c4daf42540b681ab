"""People as an oracle, through files.

The run writes a round's pairs into DIR/rounds/NNN/label/ in every format that `formats` knows, and ends.  People fill
in `pairs.csv` or `pairs.jsonl` there, or label in a tool and lay its export beside them, under any name; the same
command reads whatever is there, and either continues or says how many are missing.  Nothing of theirs is ever written
over.
"""

import pathlib
import tempfile
from collections.abc import Collection, Sequence

from activedpo_jax.files import write_atomic
from activedpo_jax.oracles import formats
from activedpo_jax.oracles.labels import Label, Pending, Question
from activedpo_jax.oracles.noise import NO_NOISE, Noise
from activedpo_jax.remote import in_store

_DONE = "README.txt"
_EXPLANATION = """\
Which of the two responses is better?  Write one of these under `preference`, for as many pairs as you like:

    first      the one in `first`          (1, a and left mean the same)
    second     the one in `second`         (2, b and right mean the same)
    tie        they are equally good
    both_bad   neither should be learnt
    skip       I cannot say

pairs.csv, pairs.jsonl       fill in one of them, here; several people write their names under `annotator`
label_studio.json            tasks to import, with label_studio_config.xml; lay the JSON export into this folder
argilla.json                 records to import, with argilla_settings.json; lay the export into this folder

Then give the command of the run again.  Answers may come in parts, and in files of any name.
"""


class PeopleOracle:
    """Asks through files.

    Args:
      folder: of the run.
      answers_per_pair: of different annotators.
      noise: flips all answers on a pair, or none of them.
    """

    asks_whole_rounds = True

    def __init__(self, folder: pathlib.Path, answers_per_pair: int, noise: Noise = NO_NOISE) -> None:
        self._folder, self.answers_per_pair, self._noise = folder, answers_per_pair, noise

    def ask(self, questions: Sequence[Question]) -> Pending:
        """Writes the questions where people find them, if they are not there, and reads the answers, all or some.

        Args:
          questions: all those of the round.

        Raises:
          ValueError: an answer cannot be read, or is on a pair that was not asked; names file and line.
        """
        folder = self._folder / "rounds" / f"{questions[0].round:03d}" / "label"
        if not (folder / _DONE).exists():
            # Nobody has been told of this folder yet, so that nobody has filled in anything.
            formats.write(folder, questions)
            write_atomic(folder / _DONE, _EXPLANATION)
        labels = read_answers(folder, {question.pair_id for question in questions})
        return Pending(
            f"fill in `preference` in {folder / 'pairs.csv'}, or lay an export of a labelling tool beside it, and give "
            "the same command again",
            self._noise.on_labels(labels),
        )


def read_answers(folder: pathlib.Path, asked: Collection[str]) -> list[Label]:
    """The answers in a round's folder, the oldest file first, so that of two by one annotator the newer counts.

    Raises:
      ValueError: an answer cannot be read, or is on a pair that is not among those asked; names file and line.
    """
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith((".", "~"))]
    files = [path for path in files if path.name not in formats.TASKS and not path.name.endswith(".partial")]
    files = [path for path in files if path.name != _DONE]
    files.sort(key=lambda path: (path.stat().st_mtime_ns, path.name))
    return [label for path in files for label in _read(path, asked)]


def _read(path: pathlib.Path, asked: Collection[str]) -> list[Label]:
    """The answers in one file, on disk or in an object store."""
    if not in_store(path):
        return formats.read(path, asked)
    with tempfile.TemporaryDirectory() as place:
        copy = pathlib.Path(place) / path.name
        copy.write_bytes(path.read_bytes())
        try:
            return formats.read(copy, asked)
        except ValueError as error:
            raise ValueError(str(error).replace(str(copy), str(path))) from error
