"Sphinx: pages from the outputs that the notebooks keep; nothing is executed or fetched"

project = "vggflow"
author = "The vggflow authors"
html_title = "vggflow"
language = "en"
smartquotes_action = "qe"  # dashes stand as they are written

extensions = [
    "myst_nb",
    "sphinx_design",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
    "sphinx.ext.mathjax",
]
suppress_warnings = [
    "mystnb.unknown_mime_type",
    "myst.header",  # pages that begin at a deeper heading
    "toc.empty_glob",  # pages that are written later
]

# Notebooks
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_code_prompt_show = "imports"
nb_code_prompt_hide = "imports"
nb_merge_streams = True
html_context = {"default_mode": "auto"}
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_dmath_double_inline = True  # $$…$$ in the middle of a paragraph
myst_heading_anchors = 3
myst_links_external_new_tab = False
toc_object_entries_show_parents = "hide"
add_module_names = False
copybutton_selector = "div.cell_input pre, div.highlight-sh pre, div.highlight-python pre"

# Papers
bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "alpha"

# MathJax is part of the site
mathjax_path = "mathjax/tex-chtml.js"
mathjax_options = {"defer": "defer"}
mathjax3_config = {
    "chtml": {"scale": 0.95},
    "startup": {"typeset": True},
}

# Pages
html_theme = "pydata_sphinx_theme"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_favicon = "static/favicon.svg"
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_show_sphinx = False
html_last_updated_fmt = None
html_theme_options = {
    "logo": {
        "text": "vggflow",
        "image_light": "static/favicon.svg",
        "image_dark": "static/favicon.svg",
    },
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "navigation_depth": 3,
    "show_nav_level": 1,
    "collapse_navigation": False,
    "show_toc_level": 2,
    "secondary_sidebar_items": {"**": ["page-toc"], "index": []},
    "footer_start": ["footer.html"],
    "footer_end": [],
    "back_to_top_button": True,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
templates_path = ["templates"]
html_sidebars = {"index": []}


def setup(app):
    "Put the part of MathJax that pages load beside the other static files"
    app.connect("build-finished", copy_mathjax)


def copy_mathjax(app, exception):
    "MathJax and its fonts, from the package that carries them"
    import importlib.util
    import shutil
    from pathlib import Path

    package = importlib.util.find_spec("sphinx-mathjax-offline")
    mathjax = Path(package.submodule_search_locations[0]) / "static" / "mathjax"
    to = Path(app.outdir) / "_static" / "mathjax"
    to.mkdir(parents=True, exist_ok=True)
    shutil.copy(mathjax / "tex-chtml.js", to)
    for part in ("output/chtml/fonts", "input/tex/extensions"):
        shutil.copytree(mathjax / part, to / part, dirs_exist_ok=True)
