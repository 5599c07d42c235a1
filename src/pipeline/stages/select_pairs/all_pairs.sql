-- Every answer against every worse one: as many pairs a prompt as there are answers that differ, of
-- which pairs_max with the largest margins are kept.
matched as (
    select b.prompt_id, b.candidate as chosen, w.candidate as rejected
    from ranked b
    join ranked w on w.prompt_id = b.prompt_id
    where b.from_best < w.from_best
),
