from detectron2.config import CfgNode as CN


def add_ssd_config(cfg: CN) -> None:
    """Add the keys of SSD, with the settings of SSD300 on COCO, to ``cfg`` in place."""
    cfg.MODEL.SSD = CN()
    # Foreground classes. Logits have one more, the background, as the last.
    cfg.MODEL.SSD.NUM_CLASSES = 80
    # Pixels: every image is resized to a square with this side.
    cfg.MODEL.SSD.IMAGE_SIZE = 300

    # Layers of build_ssd_vgg_backbone after fc7. One row a feature map: channels of the 1x1
    # convolution, then channels, kernel, stride and padding of the one that follows it.
    cfg.MODEL.SSD.EXTRA_LAYERS = [
        [256, 512, 3, 2, 1],
        [128, 256, 3, 2, 1],
        [128, 256, 3, 1, 0],
        [128, 256, 3, 1, 0],
    ]
    # All numbers of channels are multiplied by this. Above 0.
    cfg.MODEL.SSD.WIDTH = 1.0
    # Batch norm in the 13 convolutions of VGG16, for training from scratch.
    cfg.MODEL.SSD.BATCH_NORM = False

    # Default boxes. One entry per feature map; SCALES has one more, for the larger square of the
    # last map. Fractions of the image's side.
    cfg.MODEL.SSD.SCALES = [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]
    # Pixels between neighbouring centres.
    cfg.MODEL.SSD.STEPS = [8, 16, 32, 64, 100, 300]
    # Ratios beside 1; each gives a wide and a tall box.
    cfg.MODEL.SSD.ASPECT_RATIOS = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
    cfg.MODEL.SSD.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)

    # A default box with an object at this IoU or above is positive, and so is the best one of each
    # object. In (0, 1].
    cfg.MODEL.SSD.IOU_THRESHOLD = 0.5
    # Hard negative mining: negatives per positive in each image. >= 0
    cfg.MODEL.SSD.NEGATIVES_PER_POSITIVE = 3.0
    # Where smooth L1 turns from quadratic to linear, in weighted deltas. >= 0; 0 is L1.
    cfg.MODEL.SSD.SMOOTH_L1_BETA = 1.0

    # Inference: of each class the first TOPK_CANDIDATES_TEST above SCORE_THRESH_TEST go through
    # NMS; TEST.DETECTIONS_PER_IMAGE of all classes remain.
    cfg.MODEL.SSD.SCORE_THRESH_TEST = 0.01
    cfg.MODEL.SSD.TOPK_CANDIDATES_TEST = 400
    cfg.MODEL.SSD.NMS_THRESH_TEST = 0.45

    # Augmentations of SSDMapper, in addition to INPUT.RANDOM_FLIP.
    cfg.INPUT.SSD = CN()
    # Random brightness, contrast, saturation and hue.
    cfg.INPUT.SSD.PHOTOMETRIC = True
    # Every other image is placed on a canvas of the mean colour, up to this many times its size;
    # 1 switches it off. >= 1
    cfg.INPUT.SSD.MAX_ZOOM_OUT = 4.0
    # A crop in which an object has at least a random IoU with the crop.
    cfg.INPUT.SSD.IOU_CROP = True
