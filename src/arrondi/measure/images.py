"""A folder of images → how a vision-language model is called on them, by its own processor.

Owns: `Images` and `read_images`. Every image becomes one call: the image and a short question, through the processor's chat template where
it has one. What a model says of an image is read after it, so only the positions behind the image are measured.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from arrondi.checkpoint.containers.descriptors import reraise_exhaustion
from arrondi.errors import DataError, FileFormatError
from arrondi.measure.pictures import opened, pictures_in

PROMPT: Final = "Describe this image."
"""What is asked of every image."""
_PROCESSOR_FILES: Final = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Images:
    """Calls of a model, one for each image.

    Attributes:
        batches: keyword arguments, among them `input_ids` (1, tokens).
        starts: the first position behind the image in each, from which on outputs are measured.
        source: the folder's name.
        sha256: of the images' files, in order.
    """

    batches: tuple[dict[str, torch.Tensor], ...]
    starts: tuple[int, ...]
    source: str
    sha256: str

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def tokens(self) -> int:
        """Positions of all calls, those of images included."""
        return sum(batch["input_ids"].numel() for batch in self.batches)

    def part(self, start: int, stop: int | None = None) -> Images:
        """Some of them."""
        return replace(self, batches=self.batches[start:stop], starts=self.starts[start:stop])

    @property
    def protocol(self) -> str:
        """One sentence that goes beside every number."""
        return f"every image with the question {PROMPT!r}; every token behind the image predicted once"


def read_images(folder: Path, model: Path, limit: int) -> Images:
    """The first `limit` images of a folder, by name, as the processor of a model directory prepares them.

    Raises:
        FileFormatError: no such folder, no image in it, one that cannot be read, or no processor in the model directory.
        MissingExtraError: Pillow is not installed.
        DataError: the processor does not take an image and a text.
    """
    paths = pictures_in(folder)[:limit]
    processor = load_processor(model)
    text, token = _question(processor), _image_token(processor)
    digest, batches, starts = hashlib.sha256(), [], []
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
        batch = _called(processor, opened(path, "RGB"), text, path)
        places = (batch["input_ids"][0] == token).nonzero()
        if not len(places):
            raise DataError(
                f"{path}: the processor left no place for the image in the text. Its chat template does not fit this model."
            )
        start = int(places[-1])
        if start + 1 >= batch["input_ids"].shape[1]:
            raise DataError(
                f"{path}: nothing stands behind the image, so nothing can be measured. The chat template does not fit this model."
            )
        batches.append(batch)
        starts.append(start)
    return Images(tuple(batches), tuple(starts), folder.name, digest.hexdigest())


def load_processor(model: Path) -> Any:
    """The processor of a model directory: images and text together.

    Raises:
        FileFormatError: there is none, it cannot be loaded, or it takes no images.
    """
    from transformers import AutoProcessor

    if not any((model / name).exists() for name in _PROCESSOR_FILES):
        raise FileFormatError(
            f"{model}: no processor (preprocessor_config.json), so images cannot be prepared as the model expects them. Copy it from the original model, or leave --calibration-images out; the vision part is then kept as it is."
        )
    try:
        processor = AutoProcessor.from_pretrained(model, local_files_only=True)
    except Exception as error:  # whatever a broken processor raises, it is the file that is wrong
        reraise_exhaustion(error)
        reason = str(error).strip().partition("\n")[0]
        raise FileFormatError(
            f"{model}: the processor cannot be loaded ({type(error).__name__}: {reason}). Take its files from the original model."
        ) from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise FileFormatError(f"{model}: its processor takes no images with text. Leave --calibration-images out.")
    return processor


def _question(processor: Any) -> str:
    """The text of one call, with the image's place in it."""
    if getattr(processor, "chat_template", None):
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]
        try:
            return str(processor.apply_chat_template(asked, add_generation_prompt=True))
        except Exception as error:  # whatever a template raises
            reraise_exhaustion(error)
            reason = str(error).strip().partition("\n")[0]
            raise DataError(
                f"The processor's chat template does not take an image and a question ({reason})."
            ) from error
    return f"{getattr(processor, 'image_token', '<image>')}\n{PROMPT}"


def _image_token(processor: Any) -> int:
    known = getattr(processor, "image_token_id", None)
    if known is None:
        known = processor.tokenizer.convert_tokens_to_ids(getattr(processor, "image_token", "<image>"))
    return int(known)


def _called(processor: Any, image: Any, text: str, path: Path) -> dict[str, torch.Tensor]:
    try:
        found = processor(images=[image], text=[text], return_tensors="pt")
    except Exception as error:  # whatever a processor raises
        reraise_exhaustion(error)
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{path}: the processor does not take this image ({type(error).__name__}: {reason})."
        ) from error
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
