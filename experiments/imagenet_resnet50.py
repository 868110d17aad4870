"""ImageNet (1,281,167 training images, 1,000 classes) with ResNet-50, in images of 160, later 192 pixels.

    make train EXPERIMENT=imagenet_resnet50 ARGS="--stream"                       one GPU or TPU
    make train EXPERIMENT=imagenet_resnet50 ARGS="--stream --mesh data=8"         eight of one host
    cnnjax train imagenet_resnet50 --stream --mesh data=32 \
        --coordinator HOST:PORT --num-processes 4 --process-id I                  on each host I = 0 ... 3

Not measured on a GPU yet: this recipe has not been run on ImageNet. What was run is its command on a generated set of
ImageNet's shape (generate_imagenet.py), see tests/test_imagenet.py.

Expected from the literature: FFCV reports 78.4% top-1 after 88 epochs, in 77 minutes on 8 A100, with a recipe that is
similar (github.com/libffcv/ffcv-imagenet, README): the same sizes, label smoothing, no decay of normalization, and the
mean over mirror images. Differences: it has blur pools and a linear schedule, and it crops whole photos, while the
crops here are parts of their middle square, stored with 256 pixels. The plain recipe has 76.3% (Goyal et al. 2017).

ImageNet cannot be fetched automatically. Register on https://image-net.org/download-images, put
ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into downloads/manual of the tfds directory, and start: the set is
prepared there once (2 × 150 GB while it is written), without TensorFlow. A set imagenet2012 that tfds itself has
prepared is used as it is.
"""

from cnnjax import SGD, Config, CrossEntropy, ParamGroup, PhotoAugment, ResNet50, run_experiment

BATCH_SIZE, NUM_EPOCHS = 1024, 90

CONFIG = Config(
    dataset="imagenet2012",
    test_split="validation",  # The labels of the test split are secret.
    validation_fraction=0.0,
    image_size=256,  # Stored and scored. Training sees smaller crops: Touvron et al. 2019.
    num_epochs=NUM_EPOCHS,
    batch_size=BATCH_SIZE,
    tta="flip",
    loss=CrossEntropy(label_smoothing=0.1),
    model=ResNet50(dtype="bfloat16", zero_init=True),
    optim=SGD(
        learning_rate=0.1 * BATCH_SIZE / 256,  # Linear scaling, five epochs of warm-up: Goyal et al. 2017.
        schedule="cosine",
        warmup=5 / NUM_EPOCHS,
        momentum=0.9,
        weight_decay=1e-4,
        groups=(ParamGroup("(scale|bias)$", weight_decay=0.0),),
        ema=0.9999,
    ),
    augment=PhotoAugment(flip="random", train_sizes=(160, 160, 160, 192)),
)

if __name__ == "__main__":
    run_experiment(CONFIG)
