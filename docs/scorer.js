// What a search ranks first: the notebook that explains, then results and experiments, the reference last.
var Scorer = {
  score: ([page, title, anchor, description, score]) => {
    const asked = (new URLSearchParams(location.search).get("q") || "").toLowerCase().replace(/\W/g, "");
    if (asked && page.split("/").pop().replace(/\W/g, "").includes(asked)) score += 30;
    if (/^(index|quarter_hour|claims|\d\w*\/)/.test(page)) score += anchor ? 15 : 30;
    return /^(api|shape|about)/.test(page) ? score - 20 : score;
  },
  objNameMatch: 11, objPartialMatch: 6, objPrio: {0: 15, 1: 5, 2: -5}, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
};
