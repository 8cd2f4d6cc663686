"""What all runs share: folders of their own, the model, what undisturbed texts are."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ggmq.bus import BusConfig
from ggmq.engine import Engine
from ggmq.gguf import GGUF
from ggmq.model import ModelConfig, load
from ggmq.sampling import SamplingParams
from ggmq.tokenizer import StreamDecoder, Vocabulary
from tests.support.fixtures import BUNDLED, ROOT

GGMQ = [sys.executable, "-m", "ggmq"]
WORKER = [sys.executable, "-m", "workers"]
READY_S = 120.0
LIMIT_S = 150.0
"""A run ends within this long, with what is waited for in it."""
OPENINGS = ("Once upon a time", "Tom and his mother went to the park", "There was a little dog", "One day a girl",
            "The sun was warm and", "Ben had a big red ball", "In the forest", "Mia wanted to help her")  # fmt: skip
"""How the texts begin that are made at once."""
SENTENCES = " One day they went to the park and saw a big tree. The dog ran to the ball and the girl was happy."


def long_prompt(opening: str, n_sentences: int) -> str:
    return opening + "." + SENTENCES * n_sentences


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is made. Units: tokens; `n_sentences` pairs of sentences make a prompt long; seconds: no stop is longer than
    `longest_stop_s`, and every one takes `stop_s` where that is not 0."""

    n_tokens: int = 300
    n_ctx: int = 1024
    n_sentences: int = 12
    longest_stop_s: float = 5.0
    stop_s: float = 0.0


@dataclass
class Ground:
    """Attributes:
    model: the GGUF file; None: the bundled one.
    quick: every run takes the least that shows something.
    """

    sizes: Sizes = field(default_factory=Sizes)
    model: Path | None = None
    quick: bool = False

    def __post_init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="faults-"))
        self._pieces: dict[str, list[str]] = {}
        self._n = 0

    @property
    def path(self) -> Path:
        return self.model or BUNDLED

    def run_folder(self) -> Path:
        """A folder for one run, which the run removes."""
        self._n += 1
        folder = self.folder / str(self._n)
        folder.mkdir()
        return folder

    def env(self, folder: Path) -> dict[str, str]:
        """Folders of its own for whatever a process keeps; compiled kernels and manifests are shared."""
        env = {k: v for k, v in os.environ.items() if k not in ("GGMQ_KEYS", "GGMQ_CLUSTER_ID")}
        (folder / "tmp").mkdir(exist_ok=True)
        return env | {"TMPDIR": str(folder / "tmp"), "XDG_STATE_HOME": str(folder / "state"), "PYTHONPATH": str(ROOT),
                      "XDG_CONFIG_HOME": str(folder / "config")}  # fmt: skip

    def model_options(self) -> list[str]:
        return ["-m", str(self.model)] if self.model is not None else []

    def run_options(self, prompt: str, n: int) -> list[str]:
        """`ggmq run`, greedy, of this model: so many tokens behind a prompt."""
        return ["run", *self.model_options(), "-p", prompt, "-n", str(n), "--temp", "0", "--ignore-eos", "-no-cnv",
                "-c", str(self.sizes.n_ctx)]  # fmt: skip

    def text(self, prompt: str, n: int) -> str:
        """What so many tokens behind a prompt say, undisturbed. Errors: what the engine raises."""
        return self.texts([prompt], n)[0]

    def texts(self, prompts: Sequence[str], n: int) -> list[str]:
        """Of several prompts, by one worker."""
        missing = [p for p in prompts if len(self._pieces.get(p, ())) < n]
        if missing:
            vocabulary = Vocabulary(GGUF(self.path))
            config = ModelConfig(self.path, self.sizes.n_ctx, bus=BusConfig(workers=1))
            with load(config) as model:
                engine = Engine(model, vocabulary.end_ids)
                for prompt in missing:
                    engine.start(vocabulary.encode(prompt), SamplingParams(temperature=0, banned=vocabulary.end_ids))
                    decoder = StreamDecoder(vocabulary)
                    self._pieces[prompt] = [decoder.feed(t) for t in engine.generate(n)]
        return ["".join(self._pieces[p][:n]) for p in prompts]

    def prompts(self, n_seqs: int, is_long: bool) -> Sequence[str]:
        """Prompts of texts that are made at once."""
        chosen = OPENINGS[:n_seqs]
        return [long_prompt(p, self.sizes.n_sentences) for p in chosen] if is_long else chosen

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
