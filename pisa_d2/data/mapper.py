import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)


class ReadableOnly:
    """
    A mapper of dataset dicts that says which image is damaged, such as a JPEG that ends half-way:
    that shows only when it is decoded, in the midst of training.

    A file that cannot be opened at all, unlike one that cannot be understood, is still an error.
    """

    def __init__(self, mapper: Callable[[dict], dict], skip: bool) -> None:
        """
        Args:
            mapper: makes a model's input of a dataset dict, such as Detectron2's DatasetMapper.
            skip: whether to warn and leave the image out, so that the loader takes another one
                instead; otherwise it is an error.
        """
        self.mapper = mapper
        self.skip = skip

    def __call__(self, dataset_dict: dict) -> dict | None:
        try:
            return self.mapper(dataset_dict)
        except (OSError, SyntaxError) as error:  # the latter is Pillow's word for broken PNGs
            if getattr(error, "errno", None) is not None:
                raise
            name = dataset_dict.get("file_name")
            if not self.skip:
                raise OSError(f"'{name}' is damaged ({error}): copy it anew.") from error
            logger.warning("Left out '%s', which is damaged (%s): copy it anew.", name, error)
            return None
