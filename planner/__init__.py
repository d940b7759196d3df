"""What `isthmus plan` needs: what each way of training costs over a link, predicted from measured speeds.

It may import `isthmus.edge` and what is below, and no benchmark.
"""
