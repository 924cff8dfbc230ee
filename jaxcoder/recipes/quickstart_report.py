"""Results of a quickstart: held-out metrics, completions, the exported weights and the loss curve."""

import json
import lzma
import shlex
import shutil
from typing import Any

from jaxcoder.convert.to_hf import to_hf
from jaxcoder.evaluation.infilling import infill_scores, single_line_gaps
from jaxcoder.inference.generate import TextGenerator
from jaxcoder.inference.load import load_model
from jaxcoder.inference.sampling import Sampling
from jaxcoder.io.atomic import write_text
from jaxcoder.io.document import Document
from jaxcoder.io.document_files import read_documents
from jaxcoder.protocols import Progress
from jaxcoder.recipes.quickstart import Paths
from jaxcoder.report.curve import draw_curve
from jaxcoder.runtime import command_name
from jaxcoder.train.run_directory import RunDirectory

NUM_GAPS = 64
PROMPTS = ("def main(", "import os\nimport sys\n\n\nclass ")
INFILLS = (
    ("def add(a, b):\n    return ", "\n\n\ndef subtract(a, b):\n    return a - b\n"),
    ("def read(path):\n    with open(", ") as file:\n        return file.read()\n"),
)


def make_report(paths: Paths, eval_metrics: dict[str, float], progress: Progress) -> dict[str, Any]:
    """Generates, exports and draws; writes and returns report.json."""
    documents = list(read_documents(paths.held_out_documents))
    model, _, tokenizer = load_model(paths.root)
    # SPM order, where prefix and middle are adjacent: easier than PSM for a small model.
    generator = TextGenerator(model, tokenizer, truncate=True, spm=True)
    sampling = Sampling(temperature=0.5, top_p=0.9)
    gaps = single_line_gaps(documents, count=NUM_GAPS, seed=0)
    progress.start("Completing and infilling", len(gaps) + len(PROMPTS) + len(INFILLS), "prompts")
    scores = infill_scores(generator, gaps)
    progress.advance(len(gaps))
    completions = generator.complete(PROMPTS, max_new_tokens=48, sampling=sampling)
    progress.advance(len(PROMPTS))
    infills = generator.infill(INFILLS, max_new_tokens=24, stop=("\n",), sampling=sampling)
    progress.advance(len(INFILLS))
    progress.finish()

    directory = RunDirectory(str(paths.root))
    curve = draw_curve(directory.metrics_file, paths.root / "loss.png", title="jaxcoder quickstart")
    hf = paths.root / "hf"
    to_hf(paths.root, hf, overwrite=True, progress=progress)
    report = {
        "held_out": eval_metrics | {"xz_bits_per_byte": xz_bits_per_byte(documents), "files": len(documents)},
        "infill": {
            "count": scores.count,
            "edit_similarity": scores.edit_similarity,
            "exact_match": scores.exact_match,
            "examples": [[gap.line, answer] for gap, answer in zip(gaps, scores.answers, strict=True)][:10],
        },
        "completions": [[prompt, text] for prompt, text in zip(PROMPTS, completions, strict=True)],
        "infills": [[prefix, middle, suffix] for (prefix, suffix), middle in zip(INFILLS, infills, strict=True)],
        "loss_curve": str(curve),
        "checkpoints": directory.checkpoints,
        "pytorch": str(hf),
    }
    write_text(paths.root / "report.json", json.dumps(report, indent=1) + "\n")
    return report


def xz_bits_per_byte(documents: list[Document]) -> float:
    """Bits per byte of the concatenated files compressed by `xz -9e`."""
    text = "".join(document.text for document in documents).encode()
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / max(len(text), 1)


def show_report(paths: Paths, report: dict[str, Any]) -> None:
    """Prints the report and example commands."""
    held_out, infill, program = report["held_out"], report["infill"], command_name()
    width = min(shutil.get_terminal_size().columns, 100)

    def heading(title: str) -> None:
        print("\n" + f" {title} ".center(width, "-"))

    heading("results")
    print(
        f"held-out files ({held_out['files']}): loss {held_out['eval/loss']:.3f} nats per token, "
        f"{held_out['eval/bits_per_byte']:.3f} bits per byte (xz -9e needs {held_out['xz_bits_per_byte']:.3f})"
    )
    print(
        f"infilling {infill['count']} held-out lines: edit similarity {infill['edit_similarity']:.3f}, "
        f"exact match {infill['exact_match']:.1%}"
    )
    for prompt, text in report["completions"]:
        heading("completion: >>> written by the model <<<")
        print(f"{prompt}>>>{text}<<<")
    for prefix, middle, suffix in report["infills"]:
        heading("infill: >>> written by the model <<<")
        print(f"{prefix}>>>{middle}<<<{suffix}")
    heading("files")
    print(f"loss curve      {report['loss_curve']}")
    print(f"checkpoint      {report['checkpoints']}")
    print(f"PyTorch format  {report['pytorch']}")
    print(f"report          {paths.root / 'report.json'}")
    heading("next commands")
    root, pytorch, store, longer = map(
        shlex.quote, (str(paths.root), report["pytorch"], str(paths.train_store), f"{paths.root}-longer")
    )
    print(f"{program} complete {root} --prefix 'def read_file('")
    print(f"{program} complete {pytorch} --prefix 'def add(a, b): return ' --suffix '  # the sum'")
    print(f"{program} checkpoint inspect {root}")
    print(f"{program} train quickstart --data {store} --num-steps 5000 --output-dir {longer}")
