"""What a quickstart shows at the end: how good the small model is, what it writes, and where everything lies."""

import json
import lzma
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from jaxcoder.convert.to_hf import to_hf
from jaxcoder.evaluation.infilling import infill_scores, single_line_gaps
from jaxcoder.inference.generate import TextGenerator
from jaxcoder.inference.load import load_model
from jaxcoder.inference.sampling import Sampling
from jaxcoder.io.atomic import write_text
from jaxcoder.io.document import Document
from jaxcoder.io.document_files import read_documents
from jaxcoder.protocols import Progress
from jaxcoder.report.curve import draw_curve
from jaxcoder.runtime import command_name
from jaxcoder.train.run_directory import RunDirectory

if TYPE_CHECKING:
    from jaxcoder.recipes.quickstart import Paths

NUM_GAPS = 64
PROMPTS = ("def main(", "import os\nimport sys\n\n\nclass ")
INFILLS = (
    ("def add(a, b):\n    return ", "\n\n\ndef subtract(a, b):\n    return a - b\n"),
    ("def read(path):\n    with open(", ") as file:\n        return file.read()\n"),
)


def make_report(paths: "Paths", eval_metrics: dict[str, float], progress: Progress) -> dict[str, object]:
    """Evaluates, converts, draws; everything that `show_report` prints, as plain JSON."""
    documents = list(read_documents(paths.held_out_documents))
    model, _, tokenizer = load_model(paths.root)
    # Suffix first: prefix and middle then stand side by side, which so small a model needs.
    generator = TextGenerator(model, tokenizer, truncate=True, spm=True)
    likely = Sampling(temperature=0.5, top_p=0.9)
    gaps = single_line_gaps(documents, count=NUM_GAPS, seed=0)
    progress.start("Completing and infilling", len(gaps) + len(PROMPTS) + len(INFILLS), "prompts")
    scores = infill_scores(generator, gaps)
    progress.advance(len(gaps))
    completions = generator.complete(PROMPTS, max_new_tokens=48, sampling=likely)
    progress.advance(len(PROMPTS))
    infills = generator.infill(INFILLS, max_new_tokens=24, stop=("\n",), sampling=likely)
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
    write_json(paths.root / "report.json", report)
    return report


def xz_bits_per_byte(documents: list[Document]) -> float:
    """What `xz -9e` needs for the same files, one behind the other."""
    text = "".join(document.text for document in documents).encode()
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / max(len(text), 1)


def show_report(paths: "Paths", report: dict) -> None:
    """Prints the report for a person, with the commands to go on with."""
    held_out, infill, program = report["held_out"], report["infill"], command_name()
    width = min(shutil.get_terminal_size().columns, 100)
    print("\n" + " what it learned ".center(width, "-"))
    print(
        f"held-out files ({held_out['files']}): loss {held_out['eval/loss']:.3f} nats per token, "
        f"{held_out['eval/bits_per_byte']:.3f} bits per byte (xz -9e needs {held_out['xz_bits_per_byte']:.3f})"
    )
    print(
        f"infilling {infill['count']} held-out lines: edit similarity {infill['edit_similarity']:.3f}, "
        f"exact match {infill['exact_match']:.1%}"
    )
    for prompt, text in report["completions"]:
        print("\n" + " completion: >>> written by the model <<< ".center(width, "-"))
        print(f"{prompt}>>>{text}<<<")
    for prefix, middle, suffix in report["infills"]:
        print("\n" + " infill: >>> written by the model <<< ".center(width, "-"))
        print(f"{prefix}>>>{middle}<<<{suffix}")
    print("\n" + " where it is ".center(width, "-"))
    print(f"loss curve      {report['loss_curve']}")
    print(f"checkpoint      {report['checkpoints']}")
    print(f"PyTorch format  {report['pytorch']}")
    print(f"report          {paths.root / 'report.json'}")
    print("\n" + " go on with ".center(width, "-"))
    root, pytorch, store, longer = map(
        shlex.quote, (str(paths.root), report["pytorch"], str(paths.train_store), f"{paths.root}-longer")
    )
    print(f"{program} complete {root} --prefix 'def read_file('")
    print(f"{program} complete {pytorch} --prefix 'def add(a, b): return ' --suffix '  # the sum'")
    print(f"{program} checkpoint inspect {root}")
    print(f"{program} train quickstart --data {store} --num-steps 5000 --output-dir {longer}")


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")
