"""The privacy lab: what a cloud can learn of an edge's texts, what changes that, and what holds a cloud to account.

    recording    what an honest-but-curious cloud has of a session, as a file and as tensors
    attacks      guess texts from it
    measures     say how good a guess is
    ledger       runs attacks and judges them
    defences     change what an edge sends
    transcript   what a cloud signs of a session, and how it is checked

It may import `isthmus.backbone`, `isthmus.training` (the schedule of learning rates), `isthmus.protocol` (messages and
codecs), `isthmus.common`, torch and transformers; never the edge, the cloud, gRPC or Ray.
"""
