from ..common.coco import dataloader, lr_multiplier, optimizer, train
from ..common.models.faster_rcnn_fpn import model

dataloader.train.mapper.use_instance_mask = False
train.output_dir = "output/coco/lazy_faster_rcnn_R_50_FPN_1x"
