-- Which pairs teach most? Those whose answers the judge finds furthest apart.
select round, id, chosen, rejected, round(margin, 4) as margin
from pairs
order by margin desc, id, round
limit 5
----
+-------+-----+------------------------------+---------------------------------+--------+
| round | id  | chosen                       | rejected                        | margin |
+-------+-----+------------------------------+---------------------------------+--------+
| 1     | q13 | left left the                | and                             | 0.9576 |
| 1     | q15 | red green                    | three three                     | 0.9294 |
| 1     | q27 | blue blue below              | left above blue below red above | 0.9191 |
| 1     | q30 | three right                  | left red square of blue square  | 0.8972 |
| 2     | q18 | three circle left a left red | two two and blue                | 0.8963 |
+-------+-----+------------------------------+---------------------------------+--------+
