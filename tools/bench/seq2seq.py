"""`python -m tools.bench.seq2seq TASK`: fine-tunes a Whisper with transformers' Seq2SeqTrainer, as its guides
do it; prints JSON. TASK: a `Task` as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from data.captions import IGNORED, LANGUAGE, TASK
from data.decode import SAMPLE_RATE
from tools.bench.captioned import clips_of


@dataclass(frozen=True)
class Task:
    """What is trained, and how. max_steps: -1 for all epochs; out: the folder of the result."""

    model: str
    clips: str
    epochs: int
    max_steps: int
    lr: float
    batch: int
    seed: int
    bf16: bool
    out: str

    def as_json(self) -> str:
        """As the command line takes it."""
        return json.dumps(dataclasses.asdict(self))


@dataclass
class Collator:
    """Stacks features, and pads captions to the longest one. As in transformers' guides, the start token is
    left to the model."""

    processor: WhisperProcessor
    start: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """input_features: (B, mels, 3000); labels: (B, T), -100 where a caption has ended."""
        features = [{"input_features": row["input_features"]} for row in rows]
        batch = self.processor.feature_extractor.pad(features, return_tensors="pt")
        captions = [{"input_ids": row["labels"]} for row in rows]
        padded = self.processor.tokenizer.pad(captions, return_tensors="pt")
        labels = padded["input_ids"].masked_fill(padded.attention_mask.ne(1), IGNORED)
        if (labels[:, 0] == self.start).all():
            labels = labels[:, 1:]
        return {"input_features": batch["input_features"], "labels": labels}


class Stopwatch(TrainerCallback):
    """Takes the time from the beginning of training to the end of its last step."""

    began = ended = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Training begins."""
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step has been taken."""
        self.ended = time.perf_counter()


def main(task: Task) -> None:
    """Train, keep the result, and print how long it took."""
    model = WhisperForConditionalGeneration.from_pretrained(task.model, dtype=torch.float32)
    many_languages = getattr(model.generation_config, "is_multilingual", False)
    speech: dict[str, Any] = {"language": LANGUAGE, "task": TASK} if many_languages else {}
    processor = WhisperProcessor.from_pretrained(task.model, **speech)
    longest = model.config.max_target_positions
    # Before the time is taken, and kept in memory: what others do in `map` and read from a disk.
    rows = [
        {
            "input_features": processor.feature_extractor(
                clip.audio(), sampling_rate=SAMPLE_RATE
            ).input_features[0],
            "labels": processor.tokenizer(clip.caption.strip()).input_ids[:longest],
        }
        for clip in clips_of(Path(task.clips), "train")
    ]
    stopwatch = Stopwatch()
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=task.out,
            num_train_epochs=task.epochs,
            max_steps=task.max_steps,
            per_device_train_batch_size=task.batch,
            learning_rate=task.lr,
            lr_scheduler_type="linear",
            warmup_steps=0,
            max_grad_norm=1.0,
            weight_decay=0.0,
            bf16=task.bf16,
            use_cpu=not torch.cuda.is_available(),
            seed=task.seed,
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=rows,
        data_collator=Collator(processor, model.config.decoder_start_token_id),
        callbacks=[stopwatch],
    )
    trainer.train()
    model.save_pretrained(task.out)
    processor.save_pretrained(task.out)
    steps = trainer.state.global_step
    per_epoch = -(-len(rows) // task.batch)
    samples = steps // per_epoch * len(rows) + steps % per_epoch * task.batch
    seconds = stopwatch.ended - stopwatch.began
    print(json.dumps({"steps": steps, "samples": samples, "seconds": seconds}))


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # with several it would split each batch between them
    main(Task(**json.loads(sys.argv[1])))
