"""A wrapper of dataset mappers that deals with images that cannot be decoded."""

import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)


class ReadableOnly:
    """
    A mapper of dataset dicts whose errors name the image.

    Damage inside an image shows only when the image is decoded, during training. A file that cannot
    be opened at all is always an error.
    """

    def __init__(self, mapper: Callable[[dict], dict], skip: bool) -> None:
        """
        Args:
            mapper: turns a dataset dict into a model's input, such as Detectron2's DatasetMapper.
            skip: whether to warn about an image that cannot be decoded and return None, so that the
                loader takes another image; otherwise it is an error.
        """
        self.mapper = mapper
        self.skip = skip

    def __call__(self, dataset_dict: dict) -> dict | None:
        name = dataset_dict.get("file_name")
        try:
            return self.mapper(dataset_dict)
        except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for broken PNGs
            if getattr(error, "errno", None) is not None:
                raise
            if not self.skip:
                raise OSError(
                    f"'{name}' is damaged ({error}): copy or download it again."
                ) from error
            logger.warning(
                "Left out '%s', which is damaged (%s): copy or download it again.", name, error
            )
            return None
        except Exception as error:
            raise RuntimeError(
                f"'{name}' cannot be turned into an input of the model: "
                f"{type(error).__name__}: {error}"
            ) from error
