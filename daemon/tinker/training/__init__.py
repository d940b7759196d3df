"""Training by single steps: what the process of `isthmus.daemon.tinker.training_worker` does.

    training_models  the models in training, by their names, and the clouds that they need
    trained_model    one of them: forward and backward, step, save, load
    state_folder     its state on the disk, whole at any time
    adapter_copies   copies of what it has learned, which can be talked to and gone on from
    open_cloud       a link, and the base model whose weights all models of that cloud share
    lora_shape       which modules get a LoRA
    datum_batches    data as padded batches of bounded size
    loss_functions   the five losses

It may import `isthmus.edge` and what that may import, and nothing else of the daemon but
`isthmus.daemon.tinker.wire_bodies`.
"""
