"""The figures of the lessons, and the instruments that they are drawn with: one file a chapter.

A lesson calls them by what is drawn, as in `figures.four_heads()`, and its own cells stay about the idea.
"""

from course import style

style()
