"""Tutorial 1: compile a checkpoint, look at what it needs, generate, and chat.

    python -m qcc.tutorials.compile_and_chat            # the bundled model, some seconds
    python -m qcc.tutorials.compile_and_chat CHECKPOINT # any Llama, Mistral, Qwen2 or GPT-NeoX

Each step names the command line that does the same.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from qcc.compiler import CompileOptions, compile_model
from qcc.compiler.steps import Steps
from qcc.runtime import LLM, SamplingParams
from qcc.runtime.chat import Conversation, load_template
from qcc.runtime.engine.llm import Session
from qcc.runtime.engine.memory import report
from qcc.tutorials.tiny import MODEL_DIR


def main() -> None:
    """Run the tutorial."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default=str(MODEL_DIR))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tutorial(args.checkpoint, Path(folder) / "artifact")


def tutorial(checkpoint: str, artifact: Path) -> list[str]:
    """Compile into `artifact`, run it, and return the three texts that it wrote."""
    # 1. qcc compile CHECKPOINT --quant q4f16_1 --target cpu -o ARTIFACT
    # The checkpoint becomes a library for this machine and weights of 4.5 bits each. The scheme is
    # data (qcc list schemes); weights are stored once and serve every library in the folder.
    print("1. Compile")
    compile_model(checkpoint, artifact, CompileOptions(quant="q4f16_1"), Steps())

    # 2. qcc show ARTIFACT
    # The memory plan is part of the library: what it needs is known before anything is loaded.
    print("\n2. Load")
    llm = LLM(artifact)
    for part, size in report(llm.model.library.metadata)["budget"].items():
        print(f"   {part:<12}{size / 1e6:10.1f} MB")

    # 3. qcc generate ARTIFACT "Once upon a time" --n-predict 48 --temperature 0
    # A temperature of 0 takes the likeliest token each time: the same text on every run.
    print("\n3. Generate")
    greedy = SamplingParams(temperature=0, max_tokens=48)
    (story,) = llm.generate("Once upon a time, there was", greedy)
    print(f"   Once upon a time, there was{story.text}")
    print(f"   ({story.decode_tokens_per_second:.0f} tok/s)")

    # Several prompts share each pass over the weights; the answers are those of each alone.
    batch = llm.generate(["The fox", "One day in spring"], greedy)
    for prompt, answer in zip(("The fox", "One day in spring"), batch, strict=True):
        print(f"   {prompt}{answer.text[:60]} ...")

    # 4. qcc chat ARTIFACT
    # The chat template is the checkpoint's own. The conversation stays in the KV cache: a turn
    # computes only what is new.
    print("\n4. Chat")
    conversation = Conversation(load_template(artifact, llm.tokenizer.special_texts()))
    session, answers = Session(), []
    for question in ("Tell me a story about a fox named Mia.", "What is two plus three?"):
        tokens = llm.tokenizer.encode_rendered(conversation.ask(question))
        stream = llm.stream(tokens, SamplingParams(temperature=0, max_tokens=200), session)
        print(f"   > {question}\n   {''.join(stream).strip()}")
        answers.append(stream.result.text.strip())
        conversation.answer(answers[-1])
    return [story.text, *answers]


if __name__ == "__main__":
    main()
