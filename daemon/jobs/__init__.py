"""Jobs: their queue, the processes that do them, and what they leave.

    job_service   what the APIs ask
    job_specs     what a job may say, checked when it is made
    job_runner    a thread: which job runs when, and how its worker ended
    job_rows      what becomes rows: reports, events, checkpoints, results
    reports       what a worker tells, in files of the job's folder
    job_worker    the process of one job
    job_work      what it does, by the job's kind

It may import `isthmus.daemon.state` and, where a job is checked or done, `isthmus.edge`.
"""
