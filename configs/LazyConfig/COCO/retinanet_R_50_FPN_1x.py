from ..common.coco import dataloader, lr_multiplier, optimizer, train
from ..common.models.retinanet import model

dataloader.train.mapper.use_instance_mask = False
optimizer.lr = 0.01
train.output_dir = "output/coco/lazy_retinanet_R_50_FPN_1x"
