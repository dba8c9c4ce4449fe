"""lmms-eval with LLaVA models that this tool has pruned, as its model `llava`.

    accelerate launch --num_processes=1 -m lmms_eval --model llava \\
        --model_args pretrained=BASE,pruned=DIR/model.bin,device_map=auto --tasks vizwiz_vqa_val --batch_size 1

lmms-eval finds `manifest` through the entry point in `afr_st-0.dist-info`, from the repository's root or with it in
PYTHONPATH; nothing has to be installed.
"""


def manifest():
    """What lmms-eval's registry of models is told: `llava` is ours. Imports nothing heavy.

    From then on its command line exits with an error code when an evaluation fails.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    from lib.lmms.exits import exit_on_errors

    exit_on_errors()
    return ModelManifest("llava", simple_class_path=f"{__name__}.llava.PrunedLlava")
