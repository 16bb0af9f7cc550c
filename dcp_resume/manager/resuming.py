"""Load the newest whole checkpoint of a run: from a damaged one, fall back to the next older."""

from __future__ import annotations

from collections.abc import Callable, Collection

from dcp_resume.errors import InvalidCheckpoint, LoadRefused, PartialLoad, UnsupportedFormat
from dcp_resume.manager.choosing import Request, uncovered
from dcp_resume.session.load import LoadResult
from dcp_resume.session.located import Located
from dcp_resume.session.quarantining import Damage

__all__ = ["load_newest_whole"]


def load_newest_whole(
    request: Request,
    take_over: Callable[[Damage | None], Located | None],
    load: Callable[[Located, Collection[str]], LoadResult],
    give_up: Callable[[Located, Damage], None],
) -> LoadResult | None:
    """Take the run over, and load; again, while what was chosen is damaged.

    Args:
        request: Only ``latest`` falls back; who asks for one checkpoint gets that one or an error.
        take_over: Owns the run and chooses; it is told the damage of the first one tried, and
            gives None for a run that has no checkpoint yet.
        load: Loads one; it is told which tensors damaged ones changed, and must restore those.
        give_up: Quarantines one, if a second look finds the damage too.

    Raises:
        LoadRefused: It does not fit the state; nothing changed.
        InvalidCheckpoint: The asked step is damaged, or no older checkpoint is whole.
        UnsupportedFormat: A newer version wrote it; it is left as it is.
        PartialLoad: Tensors had changed, and no older checkpoint covers them.
    """
    changed: set[str] = set()
    first_damage: Damage | None = None
    while (located := take_over(first_damage)) is not None:
        try:
            return load(located, changed)
        except UnsupportedFormat:
            raise  # not damaged: another version of this library can read it
        except LoadRefused as error:
            if not changed:
                raise
            why = f"the older one does not fit the state: {error}"
            raise uncovered(changed, why) from error
        except (InvalidCheckpoint, PartialLoad) as error:
            is_whole = isinstance(error, PartialLoad) and not error.problems
            if request != "latest" or is_whole:
                raise
            changed.update(getattr(error, "written_fqns", ()))
            if not isinstance(first_damage, PartialLoad):
                first_damage = error
            give_up(located, error)
    return None
