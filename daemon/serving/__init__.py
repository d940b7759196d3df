"""Answers: the process that keeps links open and adapters hot, and what the daemon asks it.

In the daemon's process:

    answers           what the APIs ask; requests wait here
    fair_turns        whose answer is computed next
    answer_forms      prompts, sampling and pieces, and their forms on the pipe; bounds

In the process that generates:

    serving_worker    its questions
    served_cloud      links to a cloud, and the edge's part of what it serves
    hot_models        models with their adapters, in memory
    offered_drafts    what drafts tokens
    one_answer        one answer, from the prompt to its end
    answer_text       from tokens to text, and stop texts
    token_chances     sampling, and log probabilities

It may import `isthmus.daemon.workers`, `isthmus.daemon.state` and, in its own process, `isthmus.edge`.
"""
