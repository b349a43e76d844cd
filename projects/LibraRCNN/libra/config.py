from detectron2.config import CfgNode as CN


def add_libra_config(cfg: CN) -> None:
    """Add the keys of the balanced feature pyramid, as published for R-CNN, to ``cfg`` in place."""
    cfg.MODEL.LIBRA = CN()
    # The backbone that build_libra_backbone builds and balances: a name in BACKBONE_REGISTRY, of
    # one whose feature maps all have the same number of channels.
    cfg.MODEL.LIBRA.BACKBONE = "build_resnet_fpn_backbone"
    # The feature map at whose size all are averaged and refined, counted from 0, the finest. P4 is
    # 2 of P2 to P6 (R-CNN), and 1 of P3 to P7 (RetinaNet).
    cfg.MODEL.LIBRA.REFINE_LEVEL = 2
