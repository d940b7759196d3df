"""OpenAI's API: files, fine-tuning jobs, events, checkpoints, models, chat and plain completions.

It may import `isthmus.daemon.web`, and what that may import.

    openai_routes                   all of it, for the server
    file_routes                     files: uploads, lists, contents
    upload_stream                   a multipart body on its way to the disk
    training_files                  the check of a file for fine-tuning, and the hyperparameters that its size decides
    job_routes, job_bodies          fine-tuning jobs, their events and checkpoints, and what a job may be
    job_objects                     jobs, events and checkpoints as the API tells them
    model_routes, model_names       what can be talked to
    completions                     chat and plain completions
    request_fields                  how a body or a query is read, and refused
"""
