"""Opens as much of a target as the export or the import of a draft needs: its files, without loading the model."""

from typing import Any, NamedTuple

from jeagle import targets
from jeagle.config import TargetConfig
from jeagle.errors import UserError
from jeagle.interfaces import DraftSpec


class OpenTarget(NamedTuple):
    """A target's files and what they say about it. `family` is the user's own Family, or None."""

    ref: str
    files: targets.TargetFiles
    source: Any
    family: targets.Family | None
    spec: targets.TargetSpec

    def check_fits(self, draft: DraftSpec) -> None:
        """Raises UserError unless the draft was made for a target of this width and vocabulary."""
        if (draft.target_width, draft.target_vocab) != (self.spec.width, self.spec.vocab):
            raise UserError(
                f"The draft is for a target of width {draft.target_width} and vocabulary {draft.target_vocab}; "
                f"{self.ref} has {self.spec.width} and {self.spec.vocab}: give --target the model that the draft was "
                "made for."
            )


def open_target(config: TargetConfig) -> OpenTarget:
    """Opens the target that `config.ref` names. Raises UserError where it is missing or not supported."""
    files = targets.resolve(config.ref)
    source = targets.open_weights(files)
    family = targets.own_family(config.family)
    return OpenTarget(config.ref, files, source, family, targets.read_spec(source.config, family))
