"""What runs leave on disk and start from: checkpoints, patches, LoRA adapters, the run's folder.

In: the model and further state of a run, or the folders of finished runs. Out: committed
checkpoints, loaded weights, patches (changed rows). Imports `sparse` and below; knows no trainer.

    checkpointer  stored_weights  fingerprint   a checkpoint: saved and loaded, read by rows, named
    patch  patch_file  patch_model  patch_checkpoints   changed rows: in memory, as a file, of a
                                                running model, of stored checkpoints
    peft_format  merge_adapters                 LoRA adapters: PEFT's files, merged into weights
    run_folder                                  the lock of a run's folder, and what a start checks
"""
