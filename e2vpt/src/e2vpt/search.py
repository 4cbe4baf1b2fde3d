"""Search for a task's rate, decay and pruning in stages, and run the choice with several seeds.

Paper's code: 40 runs over rates and decays, then up to 72 retrainings over how much to prune.
Differs from the paper: pruning is searched one coordinate at a time (tokens, then segments of the
survivors) with short runs that start from the trained prompts; only the best few are retrained in
full. No pruning is always among the candidates. Ties go to fewer tuned parameters, then to the
lower validation loss, then to the smaller rate and decay.

Every run is a folder of its own below `trials/`. What is finished there is not run again, so a
search that was killed at any point goes on where it was.
"""

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from e2vpt import search_report
from e2vpt.search_config import SearchConfig
from e2vpt.search_stages import Stages, budget, order, searchable
from e2vpt.search_suite import search_suite, suite_searches
from e2vpt.train import Setup
from shared_utils.config import load_json, save_json, to_dict
from shared_utils.errors import InputError, Interrupted
from shared_utils.run_log import RunLog, open_run

DONE = "result.json"  # in a search folder: written last of all


def search(cfg: SearchConfig) -> Path:
    """Run all stages; write `search.json`, `table.md`, the heat map and `result.json`.

    Raises: InputError for what the user can mend; Interrupted after Ctrl-C.
    """
    _require_one_process(cfg)
    stored = replace(cfg, run=replace(cfg.run, resume="", overwrite=False))
    if cfg.run.resume:
        _require_same(stored, Path(cfg.run.resume))
    # Before there is a folder: a search that cannot start leaves none behind.
    is_done = bool(cfg.run.resume) and (Path(cfg.run.resume) / DONE).is_file()
    tasks = suite_searches(cfg) if cfg.search.suite else []
    setup = None if is_done or cfg.search.suite else searchable(cfg)
    folder = open_run(
        "e2vpt",
        f"search-{cfg.recipe}",
        runs_dir=cfg.run.runs_dir,
        name=cfg.run.name,
        resume=cfg.run.resume,
        overwrite=cfg.run.overwrite,
    )
    if not cfg.run.resume:
        save_json(stored, folder / "config.json")
    try:
        # Runs that are done are logged again, each once.
        log = RunLog(folder, resume_step=-1 if is_done else 0)
        log.say(f"run folder {folder}")
        if is_done:
            log.say((folder / "table.md").read_text())
        elif cfg.search.suite:
            log.say(search_report.budget_table(*(budget(one) for _, one in tasks)))
            search_suite(cfg, tasks, folder, log, search_one)
        else:
            log.say(search_report.budget_table(budget(cfg)))
            search_one(cfg, folder, log, setup)
        log.close()
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted(f"e2vpt search --resume {shlex.quote(str(folder))}") from None
    return folder


def search_one(
    cfg: SearchConfig, folder: Path, log: RunLog, setup: Setup | None = None
) -> dict[str, Any]:
    """Search one data set, or read what was found before.

    Args:
        cfg: what to search.
        folder: where it goes.
        log: tells how far it is.
        setup: of `searchable`, where it is there already.

    Returns: what `search.json` holds.
    """
    if not (folder / DONE).is_file():
        setup = setup or searchable(cfg)
        rows, stages = Stages(cfg, folder, setup, log).run()
        chosen = min((row for row in rows if not row.is_control), key=lambda r: order(r.chosen))
        search_report.write(folder, cfg, setup, rows, stages, chosen)
    found: dict[str, Any] = json.loads((folder / "search.json").read_text())
    log.say(search_report.table(found["rows"]))
    return found


def _require_one_process(cfg: SearchConfig) -> None:
    """Before anything is launched: every process would search on its own."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    count = max(started, cfg.run.devices * cfg.run.num_nodes)
    if count > 1:
        raise InputError("processes", count, "1", "search with one process on one device")


def _require_same(cfg: SearchConfig, folder: Path) -> None:
    """Raise InputError where a search is resumed with other options than it began with.

    The first stages ran with the old ones. The stored configuration stays as it is. Where the
    folder lies and what it is called does not matter.
    """
    before, now = (to_dict(c) for c in (load_json(SearchConfig, folder / "config.json"), cfg))
    for group, options in now.items():
        if not isinstance(options, dict):
            continue
        for name, value in options.items():
            if name not in ("name", "runs_dir") and value != before[group][name]:
                raise InputError(
                    name if group == "run" else f"{group}.{name}",
                    value,
                    f"{before[group][name]}, as the search began with",
                    "leave it out, or start a new search",
                )
