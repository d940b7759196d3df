"""The attacks of a cloud on what crosses: one file each, one shape (`attack.Attack`).

Three attacks have another aim than texts and labels, and say themselves what they take and give: `adapter_extraction`,
`membership` on returned adapters, and `span_distillation`, by which an edge steals from the cloud.

It may import `isthmus.privacy.recording` and what that may import, `isthmus.backbone`, and the schedule of learning
rates of `isthmus.training`; never the defences or the measures.
An attack learns what is true from nobody: it returns a guess, which `isthmus.privacy.measures` compares.
"""
