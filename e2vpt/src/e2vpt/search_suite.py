"""A search over all tasks of VTAB-1k, each on its own, and the means beside the published ones."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from e2vpt import vtab
from e2vpt.config import ModelConfig
from e2vpt.search_config import SearchConfig
from shared_utils.checkpoint import write_text
from shared_utils.errors import InputError
from shared_utils.run_log import RunLog, write_result

CHOSEN = "e2vpt, chosen on the validation images"
FACTS = ("device", "precision", "processes", "versions", "backbone", "normalize")

Search = tuple[vtab.Task, SearchConfig]


def suite_searches(cfg: SearchConfig) -> list[Search]:
    """The tasks that are there, in the order of the paper, with the search of each.

    Prompt lengths are each task's own, those of the released commands.

    Raises: InputError where there is no task, the lists of one are wrong, or an option is given
        that each task sets by itself.
    """
    root, fresh = cfg.search.data_root, ModelConfig()
    for name in ("num_visual_prompts", "num_kv_prompts"):
        if getattr(cfg.model, name) != getattr(fresh, name):
            raise InputError(
                f"model.{name}",
                getattr(cfg.model, name),
                "nothing, as each task of the suite has a number of its own",
                "leave it out, or search tasks one by one",
            )
    if cfg.data.source != f"data/vtab-1k/{vtab.TASKS[0].folder}":  # the recipe's
        raise InputError(
            "data.source",
            f"'{cfg.data.source}'",
            "nothing, as the suite has many sources",
            "give --search.data-root, the folder that holds them",
        )
    found = []
    for task in vtab.TASKS:
        folder = root / task.folder
        if not vtab.is_vtab_task(folder):
            continue
        # Now, and not when days have gone into the tasks before it.
        vtab.load_vtab_task(folder, skip_missing=cfg.data.skip_bad)
        model = replace(
            cfg.model,
            num_visual_prompts=task.num_visual_prompts,
            num_kv_prompts=task.num_kv_prompts,
        )
        data = replace(cfg.data, source=str(folder))
        options = replace(cfg.search, suite="")
        found.append((task, replace(cfg, model=model, data=data, search=options)))
    if not found:
        raise InputError(
            "search.data_root",
            f"'{root}', which holds no VTAB-1k task",
            "folders like cifar with train800.txt",
            "see e2vpt data check vtab",
        )
    return found


def search_suite(
    cfg: SearchConfig,
    tasks: Sequence[Search],
    folder: Path,
    log: RunLog,
    search_one: Callable[[SearchConfig, Path, RunLog], dict[str, Any]],
) -> None:
    """Search each task in a folder of its own; write the tables and `result.json` of the suite.

    Args:
        cfg: of the suite.
        tasks: of `suite_searches`.
        folder: of the suite.
        log: tells how far it is.
        search_one: searches one task and returns what its `search.json` holds.
    """
    present = {task.folder for task, _ in tasks}
    missing = [task.folder for task in vtab.TASKS if task.folder not in present]
    if missing:
        log.say(f"not there, left out: {', '.join(missing)}")
    found: dict[str, dict[str, Any]] = {}
    epochs = 0
    for count, (task, one) in enumerate(tasks, 1):
        log.say(f"task {task.folder}")
        place = folder / task.folder
        place.mkdir(exist_ok=True)
        own = RunLog(place, resume_step=-1 if (place / "result.json").is_file() else 0)
        found[task.folder] = search_one(one, place, own)
        own.close()
        result = json.loads((place / "result.json").read_text())
        epochs += result["epochs"]
        log.log(count, epochs, result["metrics"])
    accuracies = _accuracies(found)
    told = "\n\n".join(f"{label}\n{vtab.comparison(of)}" for label, of in accuracies.items())
    if missing:
        told += f"\n\nnot there, left out: {', '.join(missing)}"
    text = json.dumps({"top1_percent": accuracies, "missing": missing, "tasks": found}, indent=1)
    write_text(text + "\n", folder / "search.json")
    write_text(told + "\n", folder / "table.md")
    _picture(accuracies, folder / "search.png")
    log.say(told)
    _write_result(cfg, folder, list(found), accuracies[CHOSEN])


def _accuracies(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean test accuracy over the seeds in percent, by label and task; first what was chosen."""
    accuracies: dict[str, dict[str, float]] = {CHOSEN: {}}
    for name, one in found.items():
        for row in one["rows"]:
            label = "e2vpt with fewer prompts" if row["label"].endswith("prompts") else row["label"]
            accuracies.setdefault(label, {})[name] = 100 * row["test_mean"]
            if row["label"] == one["chosen"]:
                accuracies[CHOSEN][name] = 100 * row["test_mean"]
    return accuracies


def _picture(accuracies: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Test accuracy of each task, a mark per label."""
    from matplotlib.figure import Figure  # slow to import, and needed once at the end

    names = list(accuracies[CHOSEN])
    figure = Figure(figsize=(8, 1.5 + 0.3 * len(names)), layout="constrained")
    axes = figure.add_subplot(xlabel="test top-1 (%)", xlim=(0, 100))
    for label, of in accuracies.items():
        is_chosen = label == CHOSEN
        axes.plot(
            list(of.values()),
            [names.index(name) for name in of],
            linestyle="",
            marker="o" if is_chosen else "|",
            markersize=6 if is_chosen else 12,
            label=label,
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=120)


def _write_result(
    cfg: SearchConfig, folder: Path, names: Sequence[str], chosen: dict[str, float]
) -> None:
    """`result.json`: means over the tasks that are there; `mean19` and `mean3` where all are."""
    results = [json.loads((folder / name / "result.json").read_text()) for name in names]
    metrics = {
        key: mean(result["metrics"][key] for result in results) for key in ("val_top1", "test_top1")
    }
    if len(chosen) == len(vtab.TASKS):
        metrics |= {"mean19": vtab.mean19(chosen) / 100, "mean3": vtab.mean3(chosen) / 100}
    counts = [result["data"] for result in results]
    images = (key for key in counts[0] if key.endswith("_images"))
    write_result(
        folder,
        {
            "project": "e2vpt",
            "name": folder.name,
            "recipe": cfg.recipe,
            "method": CHOSEN,
            "seed": cfg.run.seed,
            "metrics": metrics,
            "parameters": {
                key: mean(result["parameters"][key] for result in results)
                for key in ("tuned", "total", "percent")
            },
            "data": {"name": "vtab-1k", **{k: sum(c[k] for c in counts) for k in images}},
            "tasks": list(names),
            "epochs": sum(result["epochs"] for result in results),
            "images_per_second": mean(result["images_per_second"] for result in results),
            "peak_memory_bytes": max(result["peak_memory_bytes"] for result in results),
            **{key: results[-1][key] for key in FACTS},
        },
    )
