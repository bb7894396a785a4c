"""Which operation makes what sites read, and whether scales can be folded into it: `find_folds`.

An activation X that several sites multiply can be scaled channel by channel without changing the model: X / s, and the sites' columns
times s. Where X is made by a norm or by the rows of a matrix, these take 1 / s, and nothing is left to do at run time. Whether they do
is seen by running a skeleton of the model once and following its tensors (`folds_follow`); no family of models is named.
"""

from __future__ import annotations

import torch

from arrondi.errors import SchemeError
from arrondi.model.chain import Inputs, said
from arrondi.model.fold import Fold, Producer, apply_fold
from arrondi.model.folds_follow import Followed, follow
from arrondi.model.folds_judge import Modelled, judge
from arrondi.model.skeleton import FEW, MANY, Skeleton

__all__ = ["Fold", "Producer", "apply_fold", "find_folds"]


def find_folds(source: Modelled, inputs: Inputs | None = None) -> list[Fold]:
    """Every activation that sites read, in the order of the sites; each site is in one fold at most.

    Args:
        source: a model; none of its weights is read.
        inputs: what to call it with. Default: token ids, images or sound of the sizes that its config gives.

    Raises:
        SchemeError: the model does not run.
    """
    folds, misses = judge(source, _run(source, inputs, FEW))
    return judge(source, _run(source, inputs, MANY))[0] if misses and inputs is None else folds


def _run(source: Modelled, inputs: Inputs | None, tokens: int) -> Followed:
    errors: dict[str, Exception] = {}
    skeleton = Skeleton(source.model)
    for batch in [inputs] if inputs is not None else skeleton.inputs(tokens):
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return follow(skeleton.model, skeleton.params, lambda: skeleton.model(*batch.args, **batch.kwargs))  # noqa: B023
        except Exception as error:  # it wants other inputs, and says so in its own way
            errors |= {name: error for name in ("", *batch.kwargs) if name not in errors}
    own = str(getattr(source.model, "main_input_name", ""))
    reason = errors.get(own, errors.get(""))
    tried = f" ({said(reason)})" if reason is not None else ""
    raise SchemeError(
        f"{type(source.model).__name__} does not run on inputs made up from its config{tried}. Call find_folds with inputs that it takes."
    ) from reason
