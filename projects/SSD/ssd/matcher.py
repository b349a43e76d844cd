import torch
from detectron2.modeling.matcher import Matcher
from torch import Tensor


class SSDMatcher(Matcher):
    """
    Each ground truth takes the default box that overlaps it most, if any does; other default boxes
    belong to the ground truth of highest IoU, if it reaches the threshold.

    Detectron2's ``allow_low_quality_matches`` is another rule: there the best default box of one
    ground truth may go to a second one, so that the first has none.
    """

    def __init__(self, iou_threshold: float) -> None:
        """
        Raises:
            ValueError: the threshold is not in (0, 1].
        """
        if not 0 < iou_threshold <= 1:
            raise ValueError(
                f"MODEL.SSD.IOU_THRESHOLD = {iou_threshold!r} is not allowed: it must be in (0, 1]."
            )
        super().__init__([iou_threshold], [0, 1])

    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            match_quality_matrix: floating (M, R), IoU of ground truths and default boxes.

        Returns:
            int64 (R,), the ground truth of each default box, and int8 (R,), 1 for positives and 0
            for others. Where a default box is the best of several ground truths, the last has it.
        """
        matches, labels = super().__call__(match_quality_matrix)
        if match_quality_matrix.numel() == 0:
            return matches, labels
        best_ious, best = match_quality_matrix.max(dim=1)
        objects = torch.arange(len(best), device=best.device).masked_fill(best_ious <= 0, -1)
        owners = torch.full_like(matches, -1).scatter_reduce(0, best, objects, "amax")
        owned = owners >= 0
        return torch.where(owned, owners, matches), labels.masked_fill(owned, 1)
