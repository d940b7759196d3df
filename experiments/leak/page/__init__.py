"""The ledger's figures and its page, made of the JSON of `isthmus experiment leak`.

    ledger_rows    the strongest attack of each row, the frontier, and its sentence
    themed_svg     matplotlib's SVG in the colours of a light and a dark theme
    leak_figures   the four figures
    leak_page      one HTML file that asks nobody for anything, and the figures beside it

It may import `isthmus.common`, and `isthmus.privacy.ledger` for what each attack sees and knows.
"""
