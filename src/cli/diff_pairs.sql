-- Of the prompts that both tables of pairs have: for how many they pair other answers.
select count(*) as prompts,
       count(*) filter (where a.texts <> b.texts) as other
from (select prompt_id, string_agg(chosen || chr(0) || rejected, chr(1) order by chosen, rejected) as texts
      from a group by prompt_id) a
join (select prompt_id, string_agg(chosen || chr(0) || rejected, chr(1) order by chosen, rejected) as texts
      from b group by prompt_id) b on a.prompt_id = b.prompt_id
