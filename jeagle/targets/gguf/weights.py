"""Reading a target from a GGUF file: its configuration, and its weights under Hugging Face's names."""

from __future__ import annotations

import re
from pathlib import Path

from jeagle.errors import UserError
from jeagle.targets.gguf.config import read_config
from jeagle.targets.gguf.names import CONFIGURING, NAMES, Recipe
from jeagle.targets.gguf.reader import Gguf, open_gguf
from jeagle.targets.quantised.views import NamedViews, View


class GgufWeights(NamedViews):
    """The WeightSource of a GGUF, split or not. Arrays are float32, whatever their type in the file.

    Raises:
      UserError: for an architecture, a switch of its metadata or a tensor that is not honoured, naming it.
    """

    def __init__(self, path: Path):
        self._path = path  # named already by what `_made` refuses
        opened = open_gguf(path)
        self.config = read_config(opened)
        super().__init__(path, self._made(opened, NAMES[opened.metadata["general.architecture"]]))

    def _made(self, opened: Gguf, recipes: dict[str, Recipe]) -> dict[str, View]:
        experts = self.config.get("num_local_experts") or self.config.get("num_experts")
        experts = experts or self.config.get("n_routed_experts") or 0
        made, used = {}, set(CONFIGURING)
        for pattern, recipe in recipes.items():
            for i in range(self.config["num_hidden_layers"]) if "{i}" in pattern else [0]:
                sources = [source.format(i=i) for source in recipe.sources]
                if not all(source in opened.tensors for source in sources):
                    continue
                used.update(sources)
                views = [opened.tensors[source] for source in sources]
                for e in range(experts) if "{e}" in pattern else [0]:
                    made[pattern.format(i=i, e=e)] = recipe.make(views, self.config, e)
        self._check_used(set(opened.tensors) - used)
        return made

    def _check_used(self, unused: set[str]) -> None:
        """Layers that only predict further tokens (DeepSeek's and GLM's MTP) may stay unread; nothing else may."""
        layers = self.config["num_hidden_layers"]
        strange = sorted(
            name for name in unused if not ((m := re.match(r"blk\.(\d+)\.", name)) and int(m[1]) >= layers)
        )
        if strange:
            raise UserError(
                f"The target {self._path} has a tensor {strange[0]} that jeagle does not know for this architecture: "
                "it would be left out of the model, so the file is refused."
            )
