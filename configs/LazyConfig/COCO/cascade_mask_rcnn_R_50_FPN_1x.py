from ..common.coco import dataloader, lr_multiplier, optimizer, train
from ..common.models.cascade_mask_rcnn_fpn import model

train.output_dir = "output/coco/lazy_cascade_mask_rcnn_R_50_FPN_1x"
